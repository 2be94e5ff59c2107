#!/usr/bin/env bash
# From nothing to a small GPT with hyper-connections that writes Python:
#
#   bash examples/quickstart.sh                          one model with dynamic hyper-connections
#   bash examples/quickstart.sh --compare                the plain residual against it, and a page that shows both
#   bash examples/quickstart.sh --compare plain,mhc,frac others: names of files in examples/residual, and plain
#   ... --input PATH | --dataset NAME_OR_PATH            your own text, see docs/data.md for what can be read
#
# Sets up an environment, makes a corpus (the sources of this machine's Python standard library, or your own text),
# trains a tokenizer, pretrains, writes text, draws the loss. What is there already is used again; an interrupted run
# goes on. Everything lands in quickstart/ beside this folder (--output DIR).
set -eu
here="$PWD"
cd "$(dirname "$0")/.."

usage() {
  echo "quickstart.sh: error: $1 (known: --compare [METHOD,...], --input PATH, --dataset NAME_OR_PATH, --output DIR)" >&2
  exit 2
}
from_here() { # a path as seen from where the script was started; a name that is no path stays as it is
  if [ -e "$here/$1" ]; then echo "$here/$1"; else echo "$1"; fi
}

input="" dataset="" output="quickstart" compare=""
while [ $# -gt 0 ]; do
  case "$1" in
    --input) [ $# -gt 1 ] || usage "--input needs a path"; input="$(from_here "$2")"; shift 2 ;;
    --dataset) [ $# -gt 1 ] || usage "--dataset needs a name or path"; dataset="$(from_here "$2")"; shift 2 ;;
    --output)
      [ $# -gt 1 ] && [ -n "$2" ] || usage "--output needs a folder"
      case "$2" in /*) output="$2" ;; *) [ "$here" = "$PWD" ] && output="$2" || output="$here/$2" ;; esac
      shift 2 ;;
    --compare)
      compare="plain,hyper"; shift
      case "${1:---}" in --*) ;; *) compare="$1"; shift ;; esac ;;
    *) usage "unknown argument $1" ;;
  esac
done
[ -z "$input" ] || [ -z "$dataset" ] || usage "give --input or --dataset, not both"
if [ -n "$input" ] && [ ! -r "$input" ]; then
  echo "quickstart.sh: error: --input $input cannot be read" >&2
  exit 2
fi
for method in $(echo "$compare" | tr , " "); do
  if [ "$method" != plain ] && [ ! -e "examples/residual/$method.yaml" ]; then
    known="$(cd examples/residual && ls ./*.yaml | sed 's|^./||; s|.yaml$||' | tr "\n" " ")"
    echo "quickstart.sh: error: --compare $method is unknown (known: plain $known)" >&2
    exit 2
  fi
done

extras=""
case "$dataset$input" in
  "") ;;
  *.jsonl | *.txt | *.json | *.gz) ;;
  *) extras="data" ;;
esac
[ -z "$compare" ] || extras="${extras:+$extras,}plot"
# Threads that wait sleep instead of spinning: on a machine that does other work too, spinning costs ten times the time.
export OMP_WAIT_POLICY="${OMP_WAIT_POLICY:-PASSIVE}"
. tools/setup_env.sh
set_up_environment "${extras:+[$extras]}"
mkdir -p "$output"

# Another text than last time: what was made from the old one is of no use.
source_of_text="${input:-${dataset:-standard library}}"
if [ "$(cat "$output/source.txt" 2>/dev/null)" != "$source_of_text" ]; then
  rm -rf "$output/corpus.jsonl" "$output"/tokenizer.* "$output"/corpus_text_document.* "$output"/corpus.partial-* \
    "$output/cache" "$output/run" "$output/compare"
  echo "$source_of_text" >"$output/source.txt"
fi

echo "== 1/5  corpus"
if [ -n "$dataset" ]; then
  text=(--dataset "$dataset")
elif [ -n "$input" ]; then
  text=(--input "$input")
  # Plain text with blank lines: documents are paragraphs. Without them, lines.
  case "$input" in *.txt) if grep -qm1 '^$' "$input"; then text+=(--document-separator '\n\n'); fi ;; esac
else
  text=(--input "$output/corpus.jsonl")
  [ -e "$output/corpus.jsonl" ] || python tools/make_corpus.py --output "$output/corpus.jsonl"
fi

echo "== 2/5  tokenizer"
[ -e "$output/tokenizer.model" ] ||
  python tools/train_tokenizer.py "${text[@]}" --output-prefix "$output/tokenizer" --vocab-size 4096 --soft-vocab-limit

echo "== 3/5  dataset"
[ -e "$output/corpus_text_document.idx" ] ||
  python tools/preprocess_data.py "${text[@]}" --output-prefix "$output/corpus" \
    --tokenizer-type SentencePieceTokenizer --tokenizer-model "$output/tokenizer.model" --append-eod --workers 2

prompt="def "
# Words begin with their space: a model that has never seen one alone would write nothing after "The ".
[ "$source_of_text" = "standard library" ] || prompt="The"

pretrain() { # FOLDER FLAGS: one run
  local folder="$1"
  shift
  python pretrain_gpt.py --yaml-cfg examples/quickstart.yaml "$@" \
    --data-path "$output/corpus_text_document" --data-cache-path "$output/cache" \
    --tokenizer-type SentencePieceTokenizer --tokenizer-model "$output/tokenizer.model" \
    --save "$folder" --load "$folder" --metrics-jsonl "$folder/metrics.jsonl"
}

if [ -n "$compare" ]; then
  runs=()
  for method in $(echo "$compare" | tr , " "); do
    echo "== 4/5  training: $method"
    if [ "$method" = plain ]; then
      pretrain "$output/compare/plain" --residual-connection plain
    else
      pretrain "$output/compare/$method" --yaml-cfg "examples/residual/$method.yaml"
    fi
    runs+=("$method=$output/compare/$method")
  done
  echo "== 5/5  the page"
  python tools/compare_runs.py "${runs[@]}" --output "$output/compare.html" --png "$output/compare.png" \
    --prompt "$prompt" --title "Residual paths compared: $(echo "$compare" | sed 's/,/, /g')"
  echo "Open $output/compare.html in a browser."
  exit 0
fi

echo "== 4/5  training"
pretrain "$output/run"

echo "== 5/5  what it writes"
python tools/generate.py --load "$output/run" --prompt "$prompt" --max-new-tokens 160 --temperature 0.7 --top-p 0.95
echo
python tools/plot_loss.py "$output/run/metrics.jsonl" --ascii
if python -c "import matplotlib" 2>/dev/null; then
  python tools/plot_loss.py "$output/run/metrics.jsonl" --output "$output/loss.png" && echo "also drawn in $output/loss.png"
fi
