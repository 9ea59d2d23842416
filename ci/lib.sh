# SPDX-License-Identifier: MIT OR Apache-2.0
# shellcheck shell=sh
# What ci/demo and ci/test have in common. Sourced, after `set -eu`, from the root of the source tree.

# What the host needs, beside cargo: to fetch packages, to compile in a sandbox, to link the testbench and the guest's
# static PID 1, and to apply patches.
HOST_PACKAGES="mmdebstrap bubblewrap ca-certificates debian-archive-keyring gcc libc6-dev patch"

# The oldest cargo that builds this: Debian 13's.
CARGO_MINOR=85

say() {
	printf '== %s\n' "$*"
}

# Status 4, as the testbench's own: the environment lacks something.
lacking() {
	printf 'ci: %s\n' "$*" >&2
	exit 4
}

# Installs what is missing, and only that.
host_packages() {
	command -v dpkg-query >/dev/null && command -v apt-get >/dev/null ||
		lacking "this is neither Debian nor Ubuntu; install the equivalents of: $HOST_PACKAGES"
	missing=
	for package in $HOST_PACKAGES; do
		[ "$(dpkg-query -W -f '${db:Status-Status}' "$package" 2>/dev/null)" = installed ] ||
			missing="$missing $package"
	done
	if [ -z "$missing" ]; then
		say "host packages: all there"
		return
	fi
	say "host packages: installing$missing"
	if [ "$(id -u)" = 0 ]; then
		as_root=
	elif command -v sudo >/dev/null && sudo -n true 2>/dev/null; then
		as_root="sudo -n"
	else
		lacking "as root, run this once, then start again:
    apt-get update && apt-get install --yes --no-install-recommends$missing"
	fi
	# Package lists may be older than the archive, or absent in a container.
	# shellcheck disable=SC2086 # lists of words
	{
		$as_root env DEBIAN_FRONTEND=noninteractive apt-get -q update &&
			$as_root env DEBIAN_FRONTEND=noninteractive \
				apt-get -q install --yes --no-install-recommends $missing
	} >&2 </dev/null || lacking "apt-get could not install:$missing"
}

# Cargo is the one thing that the user is asked for: which toolchain to have is the user's decision.
need_cargo() {
	# A toolchain of rustup's may not be on the PATH of a non-login shell.
	if ! command -v cargo >/dev/null && [ -x "${CARGO_HOME:-${HOME:-}/.cargo}/bin/cargo" ]; then
		PATH="${CARGO_HOME:-$HOME/.cargo}/bin:$PATH"
		export PATH
	fi
	how="Debian 13: apt-get install cargo.  Elsewhere: rustup (see https://rustup.rs), then start again."
	command -v cargo >/dev/null || lacking "cargo 1.$CARGO_MINOR or newer is needed, and there is none.
    $how"
	version=$(cargo --version | cut -d ' ' -f 2)
	minor=${version#*.}
	minor=${minor%%.*}
	case $version in
	1.*) [ "$minor" -ge "$CARGO_MINOR" ] || lacking "cargo is $version; 1.$CARGO_MINOR or newer is needed.
    $how" ;;
	esac
	say "cargo $version"
}

# Where the built binary is.
testbench() {
	"${CARGO_TARGET_DIR:-target}/release/hmm-testbench" "$@"
}

# Host packages, build, and all that a guest is made of.
prepare() {
	host_packages
	need_cargo
	say "building the testbench"
	cargo build --release
	say "what this machine has"
	# What is missing may not matter here, such as a sandbox where all modules are built already. Provisioning knows.
	testbench doctor || true
	say "provisioning"
	testbench provision "$@"
}
