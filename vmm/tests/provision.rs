// SPDX-License-Identifier: MIT OR Apache-2.0
//! Provisioning when things go wrong: programs missing, a full disk, a cut-off cache, two at once, and kill -9.
//!
//! Nothing here uses the network: a stand-in for mmdebstrap makes what the real one would, or fails as the real one does.

#![allow(missing_docs, clippy::unwrap_used, reason = "tests")]

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

/// A folder with a cache, and a PATH with stand-ins only.
struct Bench {
    dir: tempfile::TempDir,
}

/// Makes an image as Debian's packages have it, and enough of a build root to look like one.
const GOOD: &str = r#"
for root do :; done
echo "Need to get 2 MB of archives."
echo "Get:1 x trixie/main amd64 linux-image-6.12.1-cloud-amd64 amd64 6.12.1-1 [2 MB]"
release=6.12.1-cloud-amd64
mkdir -p "$root/boot" "$root/usr/bin" "$root/usr/src/linux-headers-$release"
{ head -c 510 /dev/zero; printf '\125\252\0\0HdrS'; head -c 4096 /dev/zero; } > "$root/boot/vmlinuz-$release"
echo CONFIG_HMM_MIRROR=y > "$root/boot/config-$release"
echo made >> "$COUNT"
"#;

impl Bench {
    fn new(mmdebstrap: &str) -> Self {
        let bench = Self { dir: tempfile::tempdir().unwrap() };
        bench.stand_in("mmdebstrap", mmdebstrap);
        // A QEMU that has the device, and a cargo that builds at once: neither is what is tested here.
        bench.stand_in(
            "qemu-system-x86_64",
            "echo 'QEMU emulator version 99.0'; echo 'name \"vfio-user-pci\"'",
        );
        bench.stand_in(
            "cargo",
            "out=$CARGO_TARGET_DIR/x86_64-unknown-linux-gnu/release; /bin/mkdir -p \"$out\"; : > \"$out/init\"",
        );
        bench
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn stand_in(&self, name: &str, script: &str) {
        fs::create_dir_all(self.path("bin")).unwrap();
        let file = self.path("bin").join(name);
        let version =
            "[ \"$1\" != --version ] || [ \"${0##*/}\" != mmdebstrap ] || exec echo mmdebstrap 1.3.5";
        fs::write(&file, format!("#!/bin/sh\n{version}\n{script}\n")).unwrap();
        fs::set_permissions(&file, fs::Permissions::from_mode(0o755)).unwrap();
    }

    fn command(&self, path_tail: &str) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_hmm-testbench"));
        command
            .args(["provision", "--kernel", "trixie"])
            .env("PATH", format!("{}{path_tail}", self.path("bin").display()))
            .env("CARGO", self.path("bin/cargo"))
            .env("COUNT", self.path("count"))
            .env("HMM_TESTBENCH_CACHE", self.path("cache"))
            .env("HMM_TESTBENCH_SOURCE", Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap())
            .env_remove("HMM_TESTBENCH_QEMU")
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        command
    }

    fn run(&self) -> (Output, String) {
        said(self.command(":/usr/bin:/bin").output().unwrap())
    }

    fn start(&self) -> Child {
        self.command(":/usr/bin:/bin").spawn().unwrap()
    }

    fn partials(&self) -> usize {
        fs::read_dir(self.path("cache/partial")).map_or(0, Iterator::count)
    }

    fn made(&self) -> usize {
        fs::read_to_string(self.path("count")).unwrap_or_default().lines().count()
    }

    fn image(&self) -> PathBuf {
        self.path("cache/items/kernel-trixie/root/boot/vmlinuz-6.12.1-cloud-amd64")
    }

    /// Processes that have this bench's folder on their command line or in their environment.
    fn processes(&self) -> Vec<String> {
        let mark = self.dir.path().to_str().unwrap().as_bytes().to_vec();
        let has =
            |file: PathBuf| fs::read(file).is_ok_and(|bytes| bytes.windows(mark.len()).any(|w| w == mark));
        let ours = std::process::id().to_string();
        fs::read_dir("/proc")
            .unwrap()
            .flatten()
            .filter(|entry| entry.file_name().to_string_lossy().parse::<u32>().is_ok())
            .filter(|entry| entry.file_name().to_string_lossy() != ours)
            .filter(|entry| has(entry.path().join("cmdline")) || has(entry.path().join("environ")))
            .map(|entry| {
                fs::read_to_string(entry.path().join("cmdline")).unwrap_or_default().replace('\0', " ")
            })
            .filter(|command| !command.is_empty())
            .collect()
    }
}

fn said(output: Output) -> (Output, String) {
    let text =
        format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    (output, text)
}

#[track_caller]
fn until(what: &str, mut done: impl FnMut() -> bool) {
    let start = Instant::now();
    while !done() {
        assert!(start.elapsed() < Duration::from_secs(20), "{what}");
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// The build root of the stand-in has no compiler, so every successful fetch ends in a build that cannot be done.
#[track_caller]
fn fetched(bench: &Bench) {
    assert!(bench.image().is_file());
    assert!(bench.path("cache/items/kernel-trixie/manifest.json").is_file());
}

#[test]
fn without_mmdebstrap_it_says_how_to_get_it() {
    let bench = Bench::new("");
    fs::remove_file(bench.path("bin/mmdebstrap")).unwrap();
    // mmdebstrap may be installed on this machine; a PATH without the system's folders has only sh's own needs.
    if Path::new("/usr/sbin/mmdebstrap").exists() {
        return;
    }
    let (output, text) = said(bench.command("").output().unwrap());
    assert_eq!(output.status.code(), Some(4), "{text}");
    assert!(text.contains("apt-get install mmdebstrap"), "{text}");
    assert_eq!(bench.partials(), 0);
}

#[test]
fn a_full_disk_is_one_clear_message() {
    let bench = Bench::new("echo 'tar: ./x: Cannot write: No space left on device'; exit 25");
    let (output, text) = bench.run();
    assert_eq!(output.status.code(), Some(4), "{text}");
    assert!(text.contains("no space left on the disk") && text.contains("HMM_TESTBENCH_CACHE"), "{text}");
    assert_eq!(bench.partials(), 0, "what was begun is gone");
}

#[test]
fn without_a_network_the_mirrors_error_is_shown() {
    let bench = Bench::new("echo 'E: Temporary failure resolving somewhere'; exit 25");
    let (output, text) = bench.run();
    assert_eq!(output.status.code(), Some(4), "{text}");
    assert!(text.contains("Temporary failure resolving") && text.contains("network"), "{text}");
}

#[test]
fn what_is_there_is_not_fetched_again_and_what_is_cut_off_is() {
    let bench = Bench::new(GOOD);
    bench.run();
    fetched(&bench);
    bench.run();
    assert_eq!(bench.made(), 1, "the second found it");

    // A key file cut short.
    fs::OpenOptions::new().write(true).open(bench.image()).unwrap().set_len(100).unwrap();
    let (_, text) = bench.run();
    assert!(text.contains("is made again"), "{text}");
    assert_eq!(bench.made(), 2);
    fetched(&bench);

    // No manifest: somebody copied half a cache.
    fs::remove_file(bench.path("cache/items/kernel-trixie/manifest.json")).unwrap();
    bench.run();
    assert_eq!(bench.made(), 3);

    // Any other file, before it is compiled against.
    fs::remove_file(bench.path("cache/items/kernel-trixie/root/boot/config-6.12.1-cloud-amd64")).unwrap();
    bench.run();
    assert_eq!(bench.made(), 4);
    fetched(&bench);
}

#[test]
fn two_at_once_make_it_once() {
    let bench = Bench::new(&format!("sleep 3\n{GOOD}"));
    let first = bench.start();
    let second = bench.start();
    let texts = [said(first.wait_with_output().unwrap()).1, said(second.wait_with_output().unwrap()).1];
    assert_eq!(bench.made(), 1, "{texts:?}");
    assert!(texts.iter().any(|text| text.contains("waiting for another testbench")), "{texts:?}");
    fetched(&bench);
}

#[test]
fn kill_9_leaves_no_process_and_no_file() {
    // Children of children, one of which ignores everything that can be ignored.
    let bench = Bench::new("trap '' TERM HUP INT; (trap '' TERM HUP INT; sleep 999; :) & sleep 999; :");
    let mut testbench = bench.start();
    until("mmdebstrap did not begin", || bench.partials() == 1 && bench.processes().len() >= 3);
    testbench.kill().unwrap(); // SIGKILL
    testbench.wait().unwrap();
    until("processes are left", || bench.processes().is_empty());
    until("a partial directory is left", || bench.partials() == 0);
}

#[test]
fn a_dead_makers_leavings_are_removed_by_the_next() {
    let bench = Bench::new(GOOD);
    // As after a power cut, which spares no guard.
    for item in ["kernel-trixie", "kernel-other"] {
        let dir = bench.path("cache/partial").join(format!("{item}@1-0"));
        fs::create_dir_all(&dir).unwrap();
        fs::write(dir.join("half"), "x").unwrap();
        fs::create_dir_all(bench.path("cache/locks")).unwrap();
        fs::write(bench.path("cache/locks").join(format!("{item}.lock")), "").unwrap();
    }
    bench.run();
    fetched(&bench);
    assert_eq!(bench.partials(), 0);
}

#[test]
fn a_qemu_that_was_named_but_cannot_do_it_is_refused() {
    let bench = Bench::new(GOOD);
    let (output, text) =
        said(bench.command(":/usr/bin:/bin").env("HMM_TESTBENCH_QEMU", "/bin/true").output().unwrap());
    assert_eq!(output.status.code(), Some(4), "{text}");
    assert!(text.contains("vfio-user-pci"), "{text}");
}
