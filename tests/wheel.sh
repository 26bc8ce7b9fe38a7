#!/usr/bin/env bash
# The wheel installs into a clean environment and walks a short road there, outside the repository.
set -euo pipefail

bin=$(pwd)/${BIN:-.venv/bin}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

"$bin/python" -m build -q --wheel --outdir "$work/dist" .
"${PYTHON:-python3}" -m venv "$work/venv"
wheel=$(ls "$work"/dist/*.whl)
"$work/venv/bin/pip" install -q -c constraints.txt "$wheel${DEVICE:+[$DEVICE]}"
cp data/train.jsonl data/valid.jsonl "$work"

cd "$work"
unset PYTHONPATH
brie=$work/venv/bin/brie
"$brie" --version
"$brie" nano nano --data train.jsonl --steps 3
"$brie" train --model nano --data train.jsonl --valid valid.jsonl --out run -o max_steps=2
"$brie" generate --adapter run/checkpoint-2 --prompt "Why?" --max-tokens 5
"$brie" export peft run/checkpoint-2 out --base-model brie/nano
echo "wheel: installed and walked"
