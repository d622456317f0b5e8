#!/usr/bin/env bash
# Everything that is shown on a GPU, in at most 7 minutes: the tests that fit it, then the rows.
#
#   benchmarks/gpu.sh DIR
#
# Nothing is installed. Logs and results go into DIR; a failure of one part does not stop the other.
set -u
out=${1:?usage: benchmarks/gpu.sh DIR}
cd "$(dirname "$0")/.."
mkdir -p "$out"
out=$(cd "$out" && pwd)
export HF_HUB_OFFLINE=1 PYTHONUNBUFFERED=1 PYTHONPATH="$PWD"
python=${PYTHON:-python3}

OMP_NUM_THREADS=2 timeout -s INT -k 10 150 "$python" -m pytest --device cuda -m "not distributed" -n "${WORKERS:-8}" -q \
    --maxfail 60 --maxschedchunk 4 --tb=short -p no:cacheprovider -p no:benchmark -rfE >"$out/pytest.log" 2>&1
echo "pytest: exit status $? (124: stopped after 150 seconds)" >"$out/summary.txt"

timeout -k 5 270 "$python" -m benchmarks gpu --out "$out" --minutes 4 >"$out/rows.log" 2>&1
echo "rows: exit status $?" >>"$out/summary.txt"

{
    tail -n 1 "$out/pytest.log"
    grep -E '^(FAILED|ERROR) ' "$out/pytest.log" | cut -c 1-160 | head -n 40
    grep -vE 'Warning|^  [^ ]' "$out/rows.log" | cut -c 1-200
} >>"$out/summary.txt"
cat "$out/summary.txt"
