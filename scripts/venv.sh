# For the other scripts to source, in the root of the repository. `venv_with EXTRAS` sees to it that `.venv` has this
# package with these extras, such as `demo,test`. Where that is so already it costs a moment and asks nobody.

# Ends with a text if a Python can't make the environment.
_CHECK='
import sys
if sys.version_info < (3, 11):
    sys.exit("is Python %d.%d" % sys.version_info[:2])
try:
    import ensurepip, venv
except ImportError:
    sys.exit("lacks venv; Debian and Ubuntu: apt-get install python%d.%d-venv" % sys.version_info[:2])
'

venv_with() {
  local python=.venv/bin/python extra
  ! _has "$1" || return 0
  _is_usable || python=$(_find)
  # Two scripts that are started together would install over each other. The lock lasts while 9 is open; where the file
  # system has no locks, it goes without.
  exec 9<.
  "$python" -c 'import fcntl; fcntl.flock(9, fcntl.LOCK_EX)' 2>/dev/null || true
  _is_usable || _make
  if ! _has "$1"; then
    echo "Installing wsbroadcast[$1] into .venv" >&2
    # --no-user: where PIP_USER is set, pip would refuse to install here.
    .venv/bin/python -m pip install --quiet --disable-pip-version-check --no-user -e ".[$1]"
    for extra in ${1//,/ }; do _wanted >".venv/with-$extra"; done
  fi
  exec 9<&-
}

_has() {
  local extra
  _is_usable || return 1
  for extra in ${1//,/ }; do
    [ "$(_wanted)" = "$(cat ".venv/with-$extra" 2>/dev/null)" ] || return 1
  done
}

_wanted() {
  echo "$PWD"  # the package is used where it lies
  cat pyproject.toml
}

# Whether `.venv` works, which an update of its Python can end, and was made with `$PYTHON`, if that is set.
_is_usable() {
  .venv/bin/python -c 'import sys, pip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || return 1
  [ -z "${PYTHON:-}" ] || [ "$(_build "$PYTHON")" = "$(_build .venv/bin/python)" ]
}

_build() {
  "$1" -c 'import sys; print(sys.version)' 2>/dev/null || true
}

_make() {
  local python
  python=$(_find)
  echo "Making .venv with $("$python" --version)" >&2
  "$python" -m venv --clear .venv
}

# Prints the Python to use: `$PYTHON`, else the newest that suits.
_find() {
  local python why found=
  if [ -n "${PYTHON:-}" ]; then set -- "$PYTHON"; else set -- python3.14 python3.13 python3.12 python3.11 python3; fi
  for python; do
    if ! command -v "$python" >/dev/null; then
      [ -z "${PYTHON:-}" ] || found+="  $python isn't there"$'\n'
    elif why=$("$python" -c "$_CHECK" 2>&1); then
      echo "$python"
      return
    else
      found+="  $python ${why%%$'\n'*}"$'\n'
    fi
  done
  [ -n "$found" ] || found=$'  there is no python3; Debian and Ubuntu: apt-get install python3-venv\n'
  printf 'wsbroadcast needs Python 3.11 or later, with venv:\n%sPYTHON=/path/to/python names another.\n' "$found" >&2
  return 1
}
