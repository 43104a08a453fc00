# shellcheck shell=bash
# Install packages into $VENV with uv if available, else with pip.
# Sourced by the set-up scripts, which define VENV, say and fail.

# uv does not read pip's configuration: pass on the user's mirror and certificate.
pass_on_pip_configuration() {
    local index certificate
    pip_option() { "$VENV/bin/python" -m pip config get "$1" 2>/dev/null || true; }
    index=${PIP_INDEX_URL:-$(pip_option global.index-url)}
    certificate=${PIP_CERT:-$(pip_option global.cert)}
    if [ -n "$index" ] && [ -z "${UV_INDEX_URL:-}${UV_DEFAULT_INDEX:-}" ]; then
        export UV_DEFAULT_INDEX="$index"
    fi
    if [ -n "$certificate" ] && [ -z "${SSL_CERT_FILE:-}" ]; then
        export SSL_CERT_FILE="$certificate"
    fi
}

# Takes the arguments of `pip install`.
install_packages() {
    local python="$VENV/bin/python"
    if "$python" -m uv --version >/dev/null 2>&1 || "$python" -m pip install --quiet uv; then
        pass_on_pip_configuration
        say "installing with uv"
        # Where Python writes no byte code, every process would compile torch and megatron again.
        if "$python" -m uv pip install --compile-bytecode --python "$python" "$@"; then return; fi
        say "uv did not succeed, see above; trying pip"
    else
        say "uv is not available; using pip, which is slower"
    fi
    "$python" -m pip install "$@" ||
        fail "the installation failed, see above. Fix: check the network" \
            "and the free disk space (8 GB), then run this again."
}
