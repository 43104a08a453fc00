# shellcheck shell=bash
# Sourced by the set-up scripts, which define VENV, say and fail: install into $VENV with uv where it can be had, else with pip.

# uv does not read pip's configuration: hand over a mirror or a certificate that the user gave pip.
hand_over_pip_configuration() {
    local index certificate
    index=${PIP_INDEX_URL:-$("$VENV/bin/python" -m pip config get global.index-url 2>/dev/null || true)}
    certificate=${PIP_CERT:-$("$VENV/bin/python" -m pip config get global.cert 2>/dev/null || true)}
    if [ -n "$index" ] && [ -z "${UV_INDEX_URL:-}${UV_DEFAULT_INDEX:-}" ]; then export UV_DEFAULT_INDEX="$index"; fi
    if [ -n "$certificate" ] && [ -z "${SSL_CERT_FILE:-}" ]; then export SSL_CERT_FILE="$certificate"; fi
}

# Arguments as of `pip install`.
install_packages() {
    if "$VENV/bin/python" -m uv --version >/dev/null 2>&1 || "$VENV/bin/python" -m pip install --quiet uv; then
        hand_over_pip_configuration
        say "installing with uv"
        # Compiled now, or every process of every run compiles torch and megatron again where byte code is not written.
        if "$VENV/bin/python" -m uv pip install --compile-bytecode --python "$VENV/bin/python" "$@"; then return; fi
        say "uv did not succeed, see above; trying pip"
    else
        say "uv is not to be had; using pip, which is slower"
    fi
    "$VENV/bin/python" -m pip install "$@" ||
        fail "the installation failed, see above. Fix: check the network and the free disk space (6 GB), then run this again."
}
