#!/usr/bin/env bash
# Makes this machine ready to build and test: checks the tools, installs the
# system packages that are missing, keeps one Python environment for all
# checkouts and links it here as .venv and .libtorch. Safe to run at any time:
# it does what is missing, and says in one line when nothing is.
#
#   PYTHON                which Python 3.11 to use
#   ULYSSES_CACHE         where the environments are kept
#                         (default: ~/.cache/ulysses-conformance)
#   ULYSSES_TORCH_PYTHON  a Python that has torch 2.11.0: use that torch
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)
setup=$root/setup
torch_release=2.11.0
torch_sets=("$setup/requirements-torch.txt")
other_sets=("$setup/requirements.txt" "$setup/requirements-deepspeed.txt")
need_mib=8192              # measured: 7.5 GB while the wheels are unpacked
need_mib_without_torch=1024 # measured: 0.5 GB
building=

say() { printf 'setup: %s\n' "$*"; }

die() {
    printf 'setup: error: %s\n' "$*" >&2
    exit 1
}

have() { command -v "$1" >/dev/null 2>&1; }

# --- tools -----------------------------------------------------------------

check_tools() {
    have make || die "make is missing: install it (Debian: apt-get install make)."
    have "${CXX:-c++}" || die "the C++ compiler ${CXX:-c++} is missing: install it (Debian: apt-get install g++)."
    have "${CC:-cc}" || die "the C compiler ${CC:-cc} is missing: install it (Debian: apt-get install gcc)."
    check_cargo
}

check_cargo() {
    local wanted found
    wanted=$(sed -n 's/^rust-version = "\(.*\)"/\1/p' "$root/Cargo.toml")
    if ! have cargo; then
        if [[ -x ${HOME:-}/.cargo/bin/cargo ]]; then
            die "cargo is installed but not on PATH: run '. \"\$HOME/.cargo/env\"' first."
        fi
        die "cargo is missing: install Rust $wanted or later from https://rustup.rs."
    fi
    found=$(cargo --version 2>/dev/null | cut -d' ' -f2) || found=
    if [[ -z $found ]]; then
        die "cargo does not start: try 'cargo --version'; 'rustup default stable' gives rustup a toolchain."
    fi
    at_least "$found" "$wanted" ||
        die "cargo is $found and Rust $wanted or later is needed: run 'rustup update stable', or install from https://rustup.rs."
}

at_least() { [[ $(printf '%s\n%s\n' "$2" "${1%%-*}" | sort -V | head -n 1) == "$2" ]]; }

# The Python that environments are made from, in $python, and its version in
# $python_version.
find_python() {
    local candidate
    if [[ -n ${ULYSSES_TORCH_PYTHON:-} ]]; then
        python=$ULYSSES_TORCH_PYTHON
        python_version=$(version_of "$python") ||
            die "ULYSSES_TORCH_PYTHON=$python is not a Python that starts: give the path of one that has torch $torch_release."
        at_least "$python_version" 3.11 ||
            die "ULYSSES_TORCH_PYTHON=$python is Python $python_version: the pinned packages need 3.11 or later."
        python=$(command -v "$python")
        python=$(cd "$(dirname "$python")" && pwd)/${python##*/}
        return
    fi
    if [[ -n ${PYTHON:-} ]]; then
        python=$PYTHON
        python_version=$(version_of "$python") ||
            die "PYTHON=$python is not a Python that starts: give the path of a Python 3.11, or unset it."
        [[ $python_version == 3.11.* ]] ||
            die "PYTHON=$python is Python $python_version and 3.11 is needed: give the path of a Python 3.11, or unset it."
        return
    fi
    for candidate in python3.11 python3 /usr/bin/python3.11 /usr/local/bin/python3.11; do
        python=$candidate
        python_version=$(version_of "$python") || continue
        if [[ $python_version == 3.11.* ]]; then
            return
        fi
    done
    die "Python 3.11 is missing: install it (Debian 12: apt-get install python3.11 python3.11-venv), or give its path as PYTHON=/path/to/python3.11."
}

version_of() {
    local version
    version=$("$1" -I -S -c 'import sys; print("%d.%d.%d" % sys.version_info[:3])' 2>/dev/null </dev/null) || return 1
    [[ $version =~ ^[0-9]+\.[0-9]+\.[0-9]+$ ]] || return 1
    printf '%s\n' "$version"
}

# --- system packages -------------------------------------------------------

# Judged by what the build needs, not by package names, so that an MPI from
# elsewhere (another distribution's, or a loaded module) does as well.
have_mpi() {
    have mpirun && echo '#include <mpi.h>' | "${MPICC:-mpicc}" -E -x c - >/dev/null 2>&1
}

# Where the clang-sys crate looks, which reads MPI's header for its bindings;
# the compiler's own headers must lie beside the library.
have_libclang() {
    local directory library
    local -a directories=() searched
    shopt -s nullglob
    if [[ -n ${LIBCLANG_PATH:-} ]]; then
        directories+=("$LIBCLANG_PATH" "${LIBCLANG_PATH%/*}")
    else
        if have "${LLVM_CONFIG_PATH:-llvm-config}"; then
            directories+=("$("${LLVM_CONFIG_PATH:-llvm-config}" --libdir 2>/dev/null)")
        fi
        IFS=: read -r -a searched <<<"${LD_LIBRARY_PATH:-}:${LIBRARY_PATH:-}"
        directories+=("${searched[@]}" /usr/local/llvm*/lib*)
        directories+=(/usr/lib* /usr/lib*/* /usr/local/lib* /usr/local/lib*/*)
        directories+=(/usr/lib*/*/lib* /usr/local/lib*/*/*)
    fi
    for directory in "${directories[@]}"; do
        [[ -d $directory ]] || continue
        for library in "$directory"/libclang{,-[0-9]*}.so{,.*}; do
            if [[ -e $library ]] && have_clang_headers "$(readlink -f "$library")"; then
                return 0
            fi
        done
    done
    return 1
}

have_clang_headers() {
    local header
    [[ -z ${BINDGEN_EXTRA_CLANG_ARGS:-} ]] || return 0
    for header in "${1%/*}"/clang/*/include/stddef.h "${1%/*}"/../lib/clang/*/include/stddef.h /usr/lib/llvm-*/lib/clang/*/include/stddef.h /usr/lib/clang/*/include/stddef.h /usr/lib64/clang/*/include/stddef.h; do
        [[ ! -f $header ]] || return 0
    done
    return 1
}

have_venv() { "$python" -I -c 'import ensurepip, venv' >/dev/null 2>&1; }

system_packages() {
    local -a packages=()
    have_mpi || packages+=(libopenmpi-dev openmpi-bin)
    if ! have_libclang; then
        [[ -z ${LIBCLANG_PATH:-} ]] || die "LIBCLANG_PATH=$LIBCLANG_PATH has no libclang with its headers: correct it, or unset it to have libclang-dev used."
        packages+=(libclang-dev)
    fi
    # Debian packs this part of Python separately; only a new environment
    # needs it.
    if [[ ! -f $environment/.complete ]] && ! have_venv; then
        packages+=("python${python_version%.*}-venv")
    fi
    if [[ ${#packages[@]} -gt 0 ]]; then
        install_packages "${packages[@]}"
    fi
    have_mpi || die "mpicc or mpirun does not work: put a complete MPI on PATH ('mpicc -show' and 'mpirun --version' must work), or install libopenmpi-dev and openmpi-bin."
    have_libclang || die "no libclang with its headers was found: install libclang-dev, or set LIBCLANG_PATH to the folder of libclang.so."
    if [[ ! -f $environment/.complete ]]; then
        have_venv || die "$python cannot make virtual environments: install its venv and ensurepip modules (Debian: python${python_version%.*}-venv), or give another Python 3.11 as PYTHON=/path/to/python3.11."
    fi
}

install_packages() {
    local remedy="as root, run 'apt-get update && apt-get install $*', then this again"
    local -a as_root=()
    have apt-get || die "missing here, and there is no apt-get to install it: $* (Debian's names). Install what your system calls these, or load its MPI module, then run this again."
    if [[ $(id -u) -ne 0 ]]; then
        if ! have sudo || ! sudo -n true 2>/dev/null </dev/null; then
            die "system packages are missing and only root can install them: $remedy."
        fi
        as_root=(sudo -n)
    fi
    as_root+=(env DEBIAN_FRONTEND=noninteractive apt-get -q -y -o DPkg::Lock::Timeout=600 -o Acquire::Retries=2 -o Acquire::http::Timeout=30)
    say "installing system packages, about half a minute: $*"
    # Lists that cannot be refreshed may still do.
    "${as_root[@]}" update >"$log" 2>&1 </dev/null || tail -n 5 "$log" >&2
    if ! "${as_root[@]}" install --no-install-recommends "$@" >"$log" 2>&1 </dev/null; then
        tail -n 15 "$log" >&2
        die "apt-get could not install $* (its last lines are above): without a network, connect or set apt's proxy; otherwise, $remedy."
    fi
    hash -r
}

# --- the Python environment --------------------------------------------------

# $cache, and in it $environment, named after everything that goes into it.
choose_environment() {
    local key
    if [[ -z ${ULYSSES_CACHE:-}${XDG_CACHE_HOME:-}${HOME:-} ]]; then
        die "neither HOME nor ULYSSES_CACHE is set: set ULYSSES_CACHE to a folder with room for 5 GB."
    fi
    cache=${ULYSSES_CACHE:-${XDG_CACHE_HOME:-${HOME:-}/.cache}/ulysses-conformance}
    [[ $cache == /* ]] || cache=$PWD/$cache
    key=$({
        echo "1 $python_version $(uname -m) ${ULYSSES_TORCH_PYTHON:+$python}"
        cat "${torch_sets[@]}" "${other_sets[@]}"
    } | sha256sum)
    environment=$cache/py${python_version%.*}-${ULYSSES_TORCH_PYTHON:+own-torch-}${key:0:12}
}

is_ready() {
    [[ -f $environment/.complete ]] && "$environment/bin/python" -I -S -c '' 2>/dev/null
}

lock_cache() {
    if ! mkdir -p "$cache" 2>/dev/null || [[ ! -w $cache ]]; then
        die "$cache cannot be written to: set ULYSSES_CACHE to a folder of your own."
    fi
    have flock || return 0
    exec 9>"$cache/lock"
    if ! flock -n 9; then
        say "waiting for another set-up to finish (it holds $cache/lock)"
        flock 9
    fi
}

check_space() {
    local free
    free=$(df -Pm "$cache" | awk 'NR == 2 { print $4 }')
    [[ $free -ge $1 ]] ||
        die "$cache has $free MiB free and setting up takes $1 MiB for a while: make room, or set ULYSSES_CACHE to a folder on a larger disk."
}

# Built in place, because an environment cannot be moved; .complete is written
# last, and a folder without it is one that was interrupted.
make_environment() {
    if [[ -e $environment ]]; then
        say "removing an unfinished environment, $environment"
        rm -rf "$environment"
    fi
    local started=$SECONDS libtorch
    if [[ -n ${ULYSSES_TORCH_PYTHON:-} ]]; then
        check_space "$need_mib_without_torch"
        find_torch
        say "making a Python environment in $environment with the torch of $python: downloads about 0.1 GB"
    else
        check_space "$need_mib"
        say "making a Python environment in $environment: downloads about 2.8 GB and keeps 5 GB, takes 3 minutes with a fast network"
    fi
    building=$environment
    "$python" -I -m venv "$environment" >"$log" 2>&1 || {
        cat "$log" >&2
        die "$python could not make a virtual environment in $environment (its message is above): give another Python 3.11 as PYTHON=/path/to/python3.11."
    }
    # Wheels are unpacked beside the environment and not in /tmp, which is
    # often small. The large ones bypass pip's cache: this environment is kept,
    # and a second copy would take 2.8 GB more.
    mkdir "$environment/tmp"
    say "installing the small packages (1 of 3)"
    install_python "${other_sets[0]}"
    if [[ -n ${ULYSSES_TORCH_PYTHON:-} ]]; then
        say "using torch from $torch_site (2 of 3)"
        borrow_torch
    else
        say "installing torch $torch_release with its CUDA libraries (2 of 3)"
        install_python "${torch_sets[0]}" --no-cache-dir
    fi
    say "building DeepSpeed from its source (3 of 3)"
    DS_BUILD_OPS=0 install_python "${other_sets[1]}" --no-build-isolation --ignore-installed
    say "checking the environment"
    libtorch=$(check_environment) ||
        die "the new environment is not as pinned (see above): run this again; if it stays so, look at PIP_* variables and pip's configuration."
    rm -rf "$environment/tmp"
    printf '%s\n' "$libtorch" >"$environment/.complete"
    building=
    say "the environment is ready after $((SECONDS - started)) s"
}

install_python() {
    local file=$1
    shift
    local -a command=(
        env -u PIP_USER -u PIP_TARGET -u PIP_PREFIX -u PIP_REQUIRE_HASHES -u PYTHONPATH -u PYTHONHOME
        TMPDIR="$environment/tmp" PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_INPUT=1
        "$environment/bin/python" -m pip install --no-deps "$@" -r "$file"
    )
    if [[ -t 1 ]]; then
        "${command[@]}" </dev/null || python_failed
    else
        "${command[@]}" --progress-bar off </dev/null |
            sed -unE 's/^ *((Downloading|Using cached) .*[0-9]{2}\.[0-9] MB\))$/setup:   \1/p' || # the large ones
            python_failed
    fi
}

python_failed() {
    die "pip could not install the packages (its message is above): check the network, and set HTTPS_PROXY or PIP_INDEX_URL if this machine needs them, then run this again."
}

# The folder that holds the torch of ULYSSES_TORCH_PYTHON, in $torch_site.
find_torch() {
    local found
    found=$("$python" -c 'import pathlib, torch; print(torch.__version__.split("+")[0], pathlib.Path(torch.__file__).parent.parent)' 2>"$log") || {
        tail -n 1 "$log" >&2
        die "ULYSSES_TORCH_PYTHON=$python cannot import torch (its message is above): install torch $torch_release there, or unset the variable to have it installed in the cache."
    }
    [[ ${found%% *} == "$torch_release" ]] ||
        die "ULYSSES_TORCH_PYTHON=$python has torch ${found%% *} and $torch_release is needed: install that release there, or unset the variable to have it installed in the cache."
    torch_site=${found#* }
}

# From here on the environment sees what its Python sees. Where that Python is
# a virtual environment itself, only a .pth file makes its packages visible.
borrow_torch() {
    local site
    sed -i 's/^include-system-site-packages = .*/include-system-site-packages = true/' "$environment/pyvenv.cfg"
    site=$("$environment/bin/python" -I -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
    printf '%s\n' "$torch_site" >"$site/borrowed-torch.pth"
}

check_environment() {
    local -a sets=("${other_sets[@]}")
    [[ -n ${ULYSSES_TORCH_PYTHON:-} ]] || sets+=("${torch_sets[@]}")
    "$environment/bin/python" "$setup/check_environment.py" "${sets[@]}"
}

# --- the links ---------------------------------------------------------------

link() {
    local target=$1 name=$2
    if [[ -L $root/$name && $(readlink "$root/$name") == "$target" ]]; then
        return
    fi
    if [[ -e $root/$name && ! -L $root/$name ]]; then
        die "$root/$name is not a link that this made: move it away, then run this again."
    fi
    say "linking $name to $target"
    ln -sfn "$target" "$root/$name.$$"
    mv -T "$root/$name.$$" "$root/$name"
}

link_all() {
    local libtorch
    libtorch=$(<"$environment/.complete")
    grep -qE "^__version__ = '$torch_release(\+|')" "$libtorch/version.py" 2>/dev/null ||
        die "$libtorch is no longer torch $torch_release: remove $environment, then run this again."
    link "$environment" .venv
    link "$libtorch" .libtorch
}

say_overrides() {
    if [[ -n ${LIBTORCH:-} ]]; then
        say "LIBTORCH=$LIBTORCH is set, and cargo uses that libtorch in place of .libtorch"
    elif [[ -n ${LIBTORCH_USE_PYTORCH:-} ]]; then
        say "LIBTORCH_USE_PYTORCH is set, and cargo uses the libtorch of the python on PATH in place of .libtorch"
    fi
}

clean_up() {
    [[ -z ${log:-} ]] || rm -f "$log"
    [[ -z $building ]] || rm -rf "$building"
}

main() {
    if [[ $# -gt 0 ]]; then
        sed -n '2,/^[^#]/s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"
        [[ $1 == --help || $1 == -h ]] || die "this takes no arguments."
        return
    fi
    check_tools
    find_python
    choose_environment
    log=$(mktemp)
    trap clean_up EXIT
    trap 'exit 130' INT
    trap 'exit 143' TERM HUP
    if ! have_mpi || ! have_libclang || ! is_ready; then
        lock_cache
        system_packages
        is_ready || make_environment
    fi
    link_all
    say_overrides
    say "ready"
}

main "$@"
