"""Judge models that score training pairs: local ones, and ones behind an OpenAI-compatible server.

`critic` is the interface and the cache around it, `formats` how each judge is asked, `answers` how
its answer is read, `remote` the client, `local` the judges on this machine.
"""
