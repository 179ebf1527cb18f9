# Sourced by the scripts beside it: makes .venv once and puts it first on the path.
#   prepare run    what alignkit needs
#   prepare dev    and what its tests need
# A second call with the same pyproject.toml installs nothing and needs no network.

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
venv="$root/.venv"

python_for_venv() {
    local candidate
    for candidate in python3.13 python3.12 python3.11 python3 python; do
        if command -v "$candidate" >/dev/null 2>&1 &&
            "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            echo "$candidate"
            return
        fi
    done
    echo "alignkit needs Python 3.11 or newer, and none was found on the path." >&2
    return 1
}

install() {
    if command -v uv >/dev/null 2>&1; then
        [ -x "$venv/bin/python" ] || uv venv --quiet --python "$1" "$venv"
        uv pip install --quiet --python "$venv/bin/python" -e "$2"
    else
        [ -x "$venv/bin/python" ] || "$1" -m venv "$venv"
        "$venv/bin/python" -m pip install --quiet --disable-pip-version-check -e "$2"
    fi
}

prepare() {
    local target="$root" python stamp
    [ "$1" = dev ] && target="$root[dev]"
    stamp="$venv/.installed-$1-$(cksum <"$root/pyproject.toml" | tr -d ' ')"
    if [ ! -e "$stamp" ]; then
        python="$(python_for_venv)" || return 1
        echo "Installing into $venv (some minutes the first time) ..." >&2
        install "$python" "$target" || return 1
        rm -f "$venv/.installed-$1-"*
        touch "$stamp"
    fi
    export PATH="$venv/bin:$PATH" VIRTUAL_ENV="$venv"
    # Everything below is local; a library that asks the hub would hang or fail offline.
    export HF_HUB_OFFLINE=1 HF_HUB_DISABLE_TELEMETRY=1 DO_NOT_TRACK=1 TOKENIZERS_PARALLELISM=false
}
