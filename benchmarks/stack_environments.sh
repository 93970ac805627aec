#!/usr/bin/env bash
# Environments of other training stacks, each with this repository's packages in place; read by
# stacks_yaml.sh and asft.sh. Wants `root` and `folder`: `environment llamafactory` makes
# $folder/env-llamafactory once, and uses one that is there as it is. Packages that only CUDA needs
# are left out, so lines of pip such as "pip's dependency resolver does not currently take into
# account ..." and "axolotl requires ..., which is not installed" are expected.
torch=torch==2.13.0

# What safereg_dist needs beside torch and transformers, where deepspeed is not used.
ours=(scikit-learn datasketch httpx tqdm matplotlib ninja tensorboard "setuptools>=77")

axolotl() {
    "$1" install -q --no-deps axolotl==0.19.0 trl==1.9.0 peft==0.20.0 accelerate==1.13.0 \
        optimum==1.16.2 axolotl-contribs-lgpl==0.0.7 axolotl-contribs-mit==0.0.6 \
        schedulefree==1.4.1 "kernels>=0.16,<0.17" liger-kernel==0.8.1 bitsandbytes==0.50.2 \
        torchao==0.17.0 evaluate==0.4.1 fastcore
    "$1" install -q "$torch" transformers==5.16.1 datasets==4.8.4 huggingface_hub==1.17.0 \
        tokenizers==0.23.1 pydantic==2.12.5 PyYAML==6.0.3 packaging==26.0 \
        typing-extensions==4.15.0 typer==0.25.1 nvidia-ml-py==12.560.30 python-dotenv==1.0.1 \
        posthog==6.7.11 zstandard==0.22.0 mistral-common==1.11.5 "kernels-data>=0.14.0.dev1" \
        "numba<1" "numpy<3" addict fire colorama scipy einops art psutil requests sentencepiece \
        safetensors triton tomlkit wandb
}

llamafactory() {
    "$1" install -q --no-deps llamafactory==0.9.5 trl==0.24.0 peft==0.18.1 accelerate==1.11.0 \
        "torchdata<=0.11.0"
    "$1" install -q "$torch" transformers==5.6.0 datasets==4.0.0 "tyro<0.9.0" einops fire \
        omegaconf pandas protobuf pydantic pyyaml safetensors scipy sentencepiece tiktoken \
        packaging numpy psutil tqdm requests hf-transfer
    # It imports torchaudio, whose wheels want CUDA; a module without content will do for text.
    local site
    site=$("$(dirname "$1")/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
    echo '"""Stands in for torchaudio: no audio is read."""' > "$site/torchaudio.py"
}

# Another torch than this build would bring gigabytes of CUDA: it comes first, and stays.
environment() {
    local home=$folder/env-$1
    [ -e "$home/done" ] && return
    python3 -m venv "$home"
    "$home/bin/pip" install -q "$torch"
    "$1" "$home/bin/pip"
    "$home/bin/pip" install -q "$torch" "${ours[@]}"
    "$home/bin/pip" install -q --no-deps --no-build-isolation -e "$root/kernels" -e "$root"
    touch "$home/done"
}
