// SPDX-License-Identifier: MIT OR Apache-2.0
//! Building a guest kernel, without a network and in a second: mmdebstrap's stand-in unpacks this machine's shell and tools, a `make` that
//! makes what kbuild would, and sources of two files. What is tested is what stands around the compiler.

#![allow(missing_docs, clippy::unwrap_used, reason = "tests")]

use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

/// Fills the root as packages would.
const MMDEBSTRAP: &str = r#"
[ "$1" != --version ] || exec echo mmdebstrap 1.3.5
for root do :; done
mkdir -p "$root/usr/bin" "$root/usr/src" "$root/lib64"
for program in sh tar cat grep date stat find cp mv rm mkdir sleep; do
	path=$(readlink -f "$(command -v $program)")
	cp "$path" "$root/usr/bin/$program"
	for library in $(ldd "$path" | grep -o '/[^ ]*'); do
		mkdir -p "$root${library%/*}"
		cp -L "$library" "$root$library"
	done
done
cp "$TOOLS/make" "$TOOLS/objcopy" "$root/usr/bin/"
echo "Need to get 2 MB of archives."
echo "Get:1 x trixie-backports/main amd64 linux-source-7.9 all $VERSION [1 MB]"
echo "Get:2 x trixie/main amd64 gcc-14 amd64 14.2.0-19 [1 MB]"
mkdir -p "$TOOLS/linux-source-7.9/kernel/configs"
echo all: > "$TOOLS/linux-source-7.9/Makefile"
echo CONFIG_EXPERT=y > "$TOOLS/linux-source-7.9/kernel/configs/tiny-base.config"
# Not packed, for not every machine has xz.
printf '#!/bin/sh\nexec cat\n' > "$root/usr/bin/xz"
chmod +x "$root/usr/bin/xz"
tar -C "$TOOLS" -cf "$root/usr/src/linux-source-7.9.tar.xz" linux-source-7.9
echo fetched >> "$TOOLS/count"
"#;

/// What kbuild does, as far as anybody can see.
const MAKE: &str = r#"#!/bin/sh
for word do
	case $word in
	O=*) obj=${word#O=} ;;
	KCONFIG_ALLCONFIG=*) all=${word#*=} ;;
	KBUILD_RUN_COMMAND=*) headers=${word##* } ;;
	esac
done
case "$*" in
*allnoconfig*) grep -v "${REFUSED:-=refused}" "$all" > "$obj/.config" ;;
*vmlinux*)
	echo "  CC      mm/hmm.o"
	grep -q 'LOCALVERSION="-slow"' "$obj/.config" && sleep 100
	grep -q 'LOCALVERSION="-broken"' "$obj/.config" && { echo "mm/hmm.c:7:1: error: no such thing"; exit 2; }
	mkdir -p "$obj/include/config"
	echo 7.9.0-test > "$obj/include/config/kernel.release"
	printf '\177ELF\2\1\1\0\0\0\0\0\0\0\0\0\2\0\76\0' > "$obj/vmlinux"
	;;
*run-command*)
	mkdir -p "$headers/include/config" "$headers/scripts/mod"
	for file in Makefile Module.symvers include/config/kernel.release scripts/mod/modpost; do
		echo x > "$headers/$file"
	done
	;;
esac
"#;

struct Bench {
    dir: tempfile::TempDir,
}

impl Bench {
    fn new() -> Self {
        let bench = Self { dir: tempfile::tempdir().unwrap() };
        bench.script("bin/mmdebstrap", &format!("#!/bin/sh\n{MMDEBSTRAP}"));
        bench.script(
            "bin/qemu-system-x86_64",
            "#!/bin/sh\necho 'QEMU emulator version 99.0'; echo '\"vfio-user-pci\"'\n",
        );
        let cargo =
            "out=$CARGO_TARGET_DIR/x86_64-unknown-linux-gnu/release; mkdir -p \"$out\"; : > \"$out/init\"";
        bench.script("bin/cargo", &format!("#!/bin/sh\n{cargo}\n"));
        bench.script("tools/make", MAKE);
        bench.script("tools/objcopy", "#!/bin/sh\ncp \"$2\" \"$3\"\n");
        // The parts of the configuration, of which one will change.
        let tree = Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap();
        let copied = Command::new("cp").arg("-r").arg(tree.join("guest")).arg(bench.path("guest")).status();
        assert!(copied.unwrap().success());
        fs::copy(tree.join("Cargo.toml"), bench.path("Cargo.toml")).unwrap();
        bench
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn script(&self, name: &str, text: &str) {
        let file = self.path(name);
        fs::create_dir_all(file.parent().unwrap()).unwrap();
        fs::write(&file, text).unwrap();
        fs::set_permissions(&file, fs::Permissions::from_mode(0o755)).unwrap();
    }

    fn command(&self) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_hmm-testbench"));
        command
            .args(["provision", "--kernel", "built:fast"])
            .env("PATH", format!("{}:/usr/bin:/bin:/usr/sbin:/sbin", self.path("bin").display()))
            .env("CARGO", self.path("bin/cargo"))
            .env("TOOLS", self.path("tools"))
            .env("VERSION", "7.9.1-1")
            .env("HMM_TESTBENCH_CACHE", self.path("cache"))
            .env("HMM_TESTBENCH_SOURCE", self.dir.path())
            .env_remove("HMM_TESTBENCH_QEMU")
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        command
    }

    /// There is no compiler in the root: what follows the kernel's build fails, always.
    fn run(&self) -> String {
        let output = self.command().output().unwrap();
        assert!(!output.status.success());
        format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr))
    }

    fn root(&self) -> PathBuf {
        self.path("cache/items/kernel-built-fast/root")
    }

    /// Which build the kernel that is there is of.
    fn built(&self) -> Option<u64> {
        fs::metadata(self.root().join("boot/vmlinux-7.9.0-test")).ok().map(|meta| meta.ino())
    }

    fn configure(&self, line: &str) {
        let part = self.path("guest/kernels/fast.config");
        let text = fs::read_to_string(&part).unwrap();
        fs::write(part, format!("{text}{line}\n")).unwrap();
    }

    fn partials(&self) -> usize {
        fs::read_dir(self.path("cache/partial")).map_or(0, Iterator::count)
    }
}

/// Whether there is anything to build in; where not, other tests say that it is said.
fn sandboxes() -> bool {
    let bwrap = Command::new("bwrap").args(["--unshare-all", "--ro-bind", "/", "/", "true"]).status();
    let works = bwrap.is_ok_and(|status| status.success()) || nix::unistd::geteuid().is_root();
    if !works {
        eprintln!("skipped: no sandbox here, and not root");
    }
    works
}

#[test]
fn a_kernel_is_built_once_for_a_recipe() {
    if !sandboxes() {
        return;
    }
    let bench = Bench::new();
    let said = bench.run();
    let first = bench.built().unwrap_or_else(|| panic!("{said}"));
    for file in [
        "boot/symbols-7.9.0-test",
        "boot/config-7.9.0-test",
        "usr/bin/make",
        "usr/src/linux-headers-7.9.0-test/Module.symvers",
    ] {
        assert!(bench.root().join(file).is_file(), "{file}");
    }
    assert!(!bench.root().join("usr/src/linux-source-7.9.tar.xz").exists());
    let config = fs::read_to_string(bench.root().join("boot/config-7.9.0-test")).unwrap();
    let at = |line: &str| config.lines().position(|have| have == line).unwrap();
    assert!(at("CONFIG_EXPERT=y") < at("CONFIG_HMM_MIRROR=y"), "tinyconfig's base comes first");
    assert!(at("CONFIG_HMM_MIRROR=y") < at("CONFIG_LOCALVERSION=\"-hmm-fast\""), "the flavour comes last");
    let manifest = fs::read_to_string(bench.path("cache/items/kernel-built-fast/manifest.json")).unwrap();
    assert!(manifest.contains("\"linux-image-7.9.0-test\": \"7.9.1-1\""), "{manifest}");

    bench.run();
    assert_eq!(bench.built(), Some(first), "there already");

    bench.configure("CONFIG_ANOTHER=y");
    let said = bench.run();
    let second = bench.built().unwrap_or_else(|| panic!("{said}"));
    assert_ne!(second, first, "{said}");
    assert!(said.contains("is made again"), "{said}");

    // Newer sources, once the older are gone.
    fs::remove_dir_all(bench.path("cache/items/kernel-source")).unwrap();
    let output = bench.command().env("VERSION", "7.9.2-1").output().unwrap();
    let said = String::from_utf8_lossy(&output.stdout).into_owned();
    assert_ne!(bench.built(), Some(second), "{said}");
    assert_eq!(fs::read_to_string(bench.path("tools/count")).unwrap().lines().count(), 2);
    assert_eq!(bench.partials(), 0);
}

#[test]
fn options_that_are_not_taken_are_named() {
    if !sandboxes() {
        return;
    }
    let bench = Bench::new();
    bench.script("tools/make", &MAKE.replace("=refused", "GUP_TEST\\|MAY_BE_THERE"));
    bench.configure("# optional\nCONFIG_MAY_BE_THERE=y\n# required\n# CONFIG_EPOLL is not set");
    let said = bench.run();
    assert!(said.contains("GUP_TEST=y CONFIG_EPOLL=n"), "{said}");
    assert!(said.contains("guest/kernels") && said.contains("7.9.1-1"), "{said}");
    assert!(!said.contains("MAY_BE_THERE"), "{said}");
    assert_eq!((bench.built(), bench.partials()), (None, 0));
}

#[test]
fn a_build_that_fails_shows_the_compilers_error() {
    if !sandboxes() {
        return;
    }
    let bench = Bench::new();
    bench.configure("CONFIG_LOCALVERSION=\"-broken\"");
    let said = bench.run();
    assert!(said.contains("mm/hmm.c:7:1: error: no such thing"), "{said}");
    let log = bench.path("cache/logs/kernel-built-fast.log");
    assert!(fs::read_to_string(&log).unwrap().contains("CC      mm/hmm.o"));
    assert!(said.contains(log.to_str().unwrap()), "{said}");
    assert_eq!((bench.built(), bench.partials()), (None, 0));
}

#[test]
fn a_build_that_is_killed_leaves_nothing() {
    if !sandboxes() {
        return;
    }
    let bench = Bench::new();
    bench.configure("CONFIG_LOCALVERSION=\"-slow\"");
    let mut testbench = bench.command().spawn().unwrap();
    let partial = bench.path("cache/partial");
    let begun = || {
        let entries = fs::read_dir(&partial).into_iter().flatten().flatten();
        entries.into_iter().any(|entry| {
            let name = entry.file_name().into_string().unwrap_or_default();
            name.starts_with("kernel-built-fast") && entry.path().join("out").is_dir()
        })
    };
    until("the build did not begin", &begun);
    testbench.kill().unwrap(); // SIGKILL
    testbench.wait().unwrap();
    until("a partial directory is left", &|| bench.partials() == 0);
    assert_eq!(bench.built(), None);
}

#[track_caller]
fn until(what: &str, done: &dyn Fn() -> bool) {
    let start = Instant::now();
    while !done() {
        assert!(start.elapsed() < Duration::from_secs(60), "{what}");
        std::thread::sleep(Duration::from_millis(20));
    }
}
