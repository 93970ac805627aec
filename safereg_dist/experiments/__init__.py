"""Many runs from one description: arms beside each other, on several data sets and seeds."""
