# SPDX-License-Identifier: MIT OR Apache-2.0
# Compiles a kernel, in a sandbox that has compiler and sources: $2 has the configuration's parts, $3 takes what came out, $4 is how
# many compilers run at once. Its text is part of the recipe: a change makes the kernels anew.

parts=$2 out=$3 jobs=$4
src=$out/work/src obj=$out/work/obj
mkdir -p "$src" "$obj"

echo "== unpacking the sources"
tar -C "$src" --strip-components=1 -xJf /usr/src/linux-source-*.tar.xz
cd "$src"

# The same kernel from the same sources: nothing of this machine or moment goes into it.
KBUILD_BUILD_USER=hmm-testbench KBUILD_BUILD_HOST=hmm-testbench
KBUILD_BUILD_TIMESTAMP=$(date -u -d "@$(stat -c %Y Makefile)")
export KBUILD_BUILD_USER KBUILD_BUILD_HOST KBUILD_BUILD_TIMESTAMP

echo "== configuring"
# tinyconfig and our parts, in one go: what neither names stays off.
cat kernel/configs/tiny-base.config "$parts"/*.config >"$obj/all.config"
make -s O="$obj" KCONFIG_ALLCONFIG="$obj/all.config" allnoconfig

# An option whose dependencies are missing, or that has another name by now, is dropped without a word. The same holds for the
# last of several lines about one option.
lost=
optional=
while IFS= read -r line; do
	case $line in
	"# optional"*) optional=1 ;;
	"# required"*) optional= ;;
	CONFIG_*=*)
		[ -n "$optional" ] || grep -qxF "$line" "$obj/.config" || lost="$lost ${line#CONFIG_}"
		;;
	"# CONFIG_"*" is not set")
		option=${line#"# "}
		[ -n "$optional" ] || ! grep -q "^${option%% *}=" "$obj/.config" || lost="$lost ${option%% *}=n"
		;;
	esac
done <<EOF
$(cat "$parts"/*.config)
EOF
if [ -n "$lost" ]; then
	echo "== options not taken:$lost"
	exit 1
fi

echo "== compiling"
# The PVH entry looks for a hypervisor's name with memcmp() before KASAN has its shadow, and compilers do not always make code of
# that in place: the string functions must not be instrumented, as the kernel's own lib/Makefile has it where memory is encrypted.
make O="$obj" -j"$jobs" KASAN_SANITIZE_string.o=n vmlinux modules

echo "== gathering"
cd "$obj"
# What is booted, and apart from it what names addresses.
objcopy --strip-all vmlinux "$out/image"
objcopy --only-keep-debug vmlinux "$out/symbols"
cp .config "$out/config"
cp include/config/kernel.release "$out/release"
find . -name '*.ko' | while IFS= read -r module; do
	mkdir -p "$out/modules/kernel/${module%/*}"
	cp "$module" "$out/modules/kernel/$module"
done
# What modules are built against, as the kernel's own packages have it.
make -s run-command KBUILD_RUN_COMMAND='$(srctree)/scripts/package/install-extmod-build '"$out/headers"
cp .config "$out/headers/.config"
cd /
rm -rf "$out/work"
