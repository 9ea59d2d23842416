// SPDX-License-Identifier: MIT OR Apache-2.0
//! Child processes that cannot outlive us, whatever ends us, `kill -9` included.
//!
//! Two nets, since each has a hole:
//!
//! - The child itself gets `PR_SET_PDEATHSIG`: the kernel kills it when the *thread* that forked it ends. So the
//!   thread that calls [`run`] also waits for the child; [`die_with_parent`] says the same to other callers.
//! - What the child starts in turn (`mmdebstrap` starts `apt`, `apt` starts its download methods) does not inherit that. All
//!   of it stays in the child's own process group, and a [`Guard`], a shell that waits for the end of a pipe
//!   that only we hold open, kills that group and removes the temporary directories once we are gone.

use std::ffi::OsStr;
use std::io::{self, Write};
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, ChildStdin, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use nix::fcntl::OFlag;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signal::{Signal, killpg};
use nix::unistd::Pid;

/// How much of a child's output is kept for an error message.
const TAIL_BYTES: usize = 64 * 1024;

/// What the guard does: collects process groups from its input until `done`, or until the input ends because we did.
const GUARD_SCRIPT: &str = r#"
trap '' HUP INT QUIT TERM PIPE TSTP
groups=
while IFS= read -r line; do
	case $line in
	done) exit 0 ;;
	*) groups="$groups $line" ;;
	esac
done
# A killed process may be in the middle of a system call that still makes a file; and where nobody reaps orphans, a group of
# dead ones looks alive for ever. So a few rounds, whatever they report.
for round in 1 2 3 4 5; do
	alive=
	for group in $groups; do
		kill -s KILL -- "-$group" 2>/dev/null && alive=1
	done
	[ -z "$alive" ] || sleep 0.1
	left=
	for path in "$@"; do
		rm -rf -- "$path"
		[ ! -e "$path" ] || left=1
	done
	[ -n "$alive$left" ] || break
done
"#;

/// Watches over process groups and temporary paths: when this process is gone without having dropped the guard,
/// the groups are killed and the paths removed.
#[derive(Debug)]
pub struct Guard {
    shell: Child,
    pipe: Option<ChildStdin>,
}

impl Guard {
    /// Starts a guard that will remove `paths`.
    ///
    /// # Errors
    /// When no shell can be started.
    pub fn new<P: AsRef<OsStr>>(paths: &[P]) -> io::Result<Self> {
        let mut shell = Command::new("/bin/sh")
            .arg("-c")
            .arg(GUARD_SCRIPT)
            .arg("hmm-testbench-guard")
            .args(paths)
            .current_dir("/")
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            // Apart from our group, or Ctrl-C on the terminal would end the guard together with us.
            .process_group(0)
            .spawn()?;
        let pipe = shell.stdin.take();
        Ok(Self { shell, pipe })
    }

    /// Makes the command, which must get a process group of its own, name that group to the guard before it runs.
    ///
    /// It is the child who does it: were it us, a `kill -9` that comes after the child has begun and before we have said so would
    /// leave its children behind.
    ///
    /// # Errors
    /// When the guard is gone.
    fn watch(&self, command: &mut Command) -> io::Result<()> {
        let pipe = self.pipe.as_ref().ok_or(io::ErrorKind::BrokenPipe)?.as_fd().try_clone_to_owned()?;
        let announce = move || {
            let (line, length) = decimal_line(std::process::id());
            match nix::unistd::write(&pipe, &line[..length]) {
                Ok(written) if written == length => Ok(()),
                Ok(_) => Err(io::ErrorKind::WriteZero.into()),
                Err(error) => Err(error.into()),
            }
        };
        #[allow(unsafe_code, reason = "between fork and exec; only async-signal-safe system calls are made")]
        // SAFETY: the closure allocates nothing and takes no lock: getpid, write, and an error value without a box. The
        // descriptor is its own.
        unsafe {
            command.pre_exec(announce);
        }
        Ok(())
    }
}

/// A number and a newline, made without allocating: the buffer and how much of it is used.
fn decimal_line(mut number: u32) -> ([u8; 11], usize) {
    let mut digits = [0; 10];
    let mut count = 0;
    loop {
        digits[count] = b'0' + (number % 10) as u8;
        number /= 10;
        count += 1;
        if number == 0 {
            break;
        }
    }
    let mut line = [b'\n'; 11];
    for (place, digit) in line.iter_mut().zip(digits[..count].iter().rev()) {
        *place = *digit;
    }
    (line, count + 1)
}

impl Drop for Guard {
    fn drop(&mut self) {
        if let Some(mut pipe) = self.pipe.take() {
            // A guard that is gone already needs no telling.
            let _ = pipe.write_all(b"done\n");
        }
        let _ = self.shell.wait();
    }
}

/// Makes the child die with the thread that starts it. That thread must therefore live as long as the child is wanted.
pub fn die_with_parent(command: &mut Command) -> &mut Command {
    let parent = nix::unistd::getpid();
    let prepare = move || {
        nix::sys::prctl::set_pdeathsig(Signal::SIGKILL)?;
        // The parent may have ended between fork and the line above; then nobody will send the signal.
        if nix::unistd::getppid() == parent { Ok(()) } else { Err(io::ErrorKind::Interrupted.into()) }
    };
    #[allow(unsafe_code, reason = "between fork and exec; only two async-signal-safe system calls are made")]
    // SAFETY: the closure allocates nothing and takes no lock: prctl, getppid, and an error value without a box.
    unsafe {
        command.pre_exec(prepare)
    }
}

/// How a child ended.
#[derive(Debug)]
pub struct Finished {
    /// Its exit status.
    pub status: ExitStatus,
    /// The end of what it wrote to its output and error streams.
    pub tail: String,
}

/// Runs a command to its end in a process group of its own, with no input, calling `on_line` for each line that it writes.
///
/// # Errors
/// When the program cannot be started or waited for. An unsuccessful exit is not an error here.
pub fn run(
    command: &mut Command,
    guard: Option<&Guard>,
    on_line: &mut dyn FnMut(&str),
) -> io::Result<Finished> {
    let (reader, writer) = nix::unistd::pipe2(OFlag::O_CLOEXEC)?;
    command.stdin(Stdio::null()).stdout(Stdio::from(writer.try_clone()?)).stderr(Stdio::from(writer));
    command.process_group(0);
    if let Some(guard) = guard {
        guard.watch(command)?;
    }
    let spawned = die_with_parent(command).spawn();
    // The command keeps our copies of the writing end; without this the output would never end.
    command.stdout(Stdio::null()).stderr(Stdio::null());
    let mut running = Running { child: spawned?, finished: false };

    let mut tail = Tail::default();
    let mut buffer = [0u8; 16 * 1024];
    let mut quiet_since = Instant::now();
    loop {
        let mut fds = [PollFd::new(reader.as_fd(), PollFlags::POLLIN)];
        let ready = match poll(&mut fds, PollTimeout::from(200u16)) {
            Err(nix::errno::Errno::EINTR) => continue,
            other => other?,
        };
        if ready == 0 {
            // A grandchild that lives on holds the pipe open; the child's own end is what counts.
            if quiet_since.elapsed() > Duration::from_millis(500) && running.child.try_wait()?.is_some() {
                break;
            }
            continue;
        }
        quiet_since = Instant::now();
        match nix::unistd::read(reader.as_fd(), &mut buffer) {
            Ok(0) => break,
            Ok(n) => tail.take(&buffer[..n], on_line),
            Err(nix::errno::Errno::EINTR) => {}
            Err(error) => return Err(error.into()),
        }
    }
    tail.end(on_line);
    let status = running.child.wait()?;
    running.finished = true;
    Ok(Finished { status, tail: tail.text() })
}

/// A child that is killed with its whole group unless it was waited for.
struct Running {
    child: Child,
    finished: bool,
}

impl Drop for Running {
    fn drop(&mut self) {
        if self.finished {
            return;
        }
        if let Ok(pid) = i32::try_from(self.child.id()) {
            let _ = killpg(Pid::from_raw(pid), Signal::SIGKILL);
        }
        let _ = self.child.wait();
    }
}

/// The last output, and the line being assembled.
#[derive(Default)]
struct Tail {
    kept: Vec<u8>,
    line: Vec<u8>,
}

impl Tail {
    fn take(&mut self, bytes: &[u8], on_line: &mut dyn FnMut(&str)) {
        self.kept.extend_from_slice(bytes);
        if self.kept.len() > 2 * TAIL_BYTES {
            self.kept.drain(..self.kept.len() - TAIL_BYTES);
        }
        for &byte in bytes {
            if byte == b'\n' || byte == b'\r' {
                self.end(on_line);
            } else if self.line.len() < TAIL_BYTES {
                self.line.push(byte);
            }
        }
    }

    fn end(&mut self, on_line: &mut dyn FnMut(&str)) {
        if !self.line.is_empty() {
            on_line(&String::from_utf8_lossy(&self.line));
            self.line.clear();
        }
    }

    fn text(&self) -> String {
        String::from_utf8_lossy(&self.kept).into_owned()
    }
}

/// Where a program is, as the shell would find it.
#[must_use]
pub fn find_program(name: &str) -> Option<std::path::PathBuf> {
    // Administrators' programs are not on every user's PATH.
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path)
        .chain(["/usr/sbin", "/sbin"].map(std::path::PathBuf::from))
        .map(|dir| dir.join(name))
        .find(|file| is_executable(file))
}

fn is_executable(file: &Path) -> bool {
    file.is_file() && nix::unistd::access(file, nix::unistd::AccessFlags::X_OK).is_ok()
}

/// The last `count` lines of a text that say something.
#[must_use]
pub fn last_lines(text: &str, count: usize) -> Vec<String> {
    let lines: Vec<&str> = text.lines().map(str::trim_end).filter(|line| !line.is_empty()).collect();
    lines[lines.len().saturating_sub(count)..].iter().map(|line| (*line).to_owned()).collect()
}

/// Takes an exclusive lock on an open file without waiting. False: somebody else has it.
pub(crate) fn try_lock(file: &std::fs::File) -> io::Result<bool> {
    #[allow(unsafe_code, reason = "nix's wrapper takes the file by value, and we keep a plain File")]
    // SAFETY: flock has no memory effects; the descriptor is open for the whole call.
    let result = unsafe { nix::libc::flock(file.as_raw_fd(), nix::libc::LOCK_EX | nix::libc::LOCK_NB) };
    if result == 0 {
        return Ok(true);
    }
    let error = io::Error::last_os_error();
    if error.kind() == io::ErrorKind::WouldBlock { Ok(false) } else { Err(error) }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shell(script: &str) -> Command {
        let mut command = Command::new("/bin/sh");
        command.arg("-c").arg(script);
        command
    }

    #[test]
    fn output_status_and_lines_come_back() {
        let mut lines = Vec::new();
        let done = run(&mut shell("echo one; echo two >&2; printf three; exit 3"), None, &mut |l| {
            lines.push(l.to_owned())
        })
        .unwrap();
        assert_eq!(done.status.code(), Some(3));
        assert_eq!(lines, ["one", "two", "three"]);
        assert_eq!(done.tail, "one\ntwo\nthree");
    }

    #[test]
    fn a_lingering_grandchild_does_not_hold_us() {
        let start = Instant::now();
        let done = run(&mut shell("sleep 20 & echo $!"), None, &mut |_| {}).unwrap();
        assert!(done.status.success());
        assert!(start.elapsed() < Duration::from_secs(10));
        let pid: i32 = done.tail.trim().parse().unwrap();
        let _ = nix::sys::signal::kill(Pid::from_raw(pid), Signal::SIGKILL);
    }

    #[test]
    fn only_the_end_of_long_output_is_kept() {
        let done =
            run(&mut shell("yes abcdefg | head -c 1000000; echo; echo end"), None, &mut |_| {}).unwrap();
        assert!(done.tail.len() <= 2 * TAIL_BYTES && done.tail.ends_with("end\n"));
    }

    #[test]
    fn numbers_are_lines() {
        for number in [0, 7, 10, 4096, u32::MAX] {
            let (line, length) = decimal_line(number);
            assert_eq!(std::str::from_utf8(&line[..length]).unwrap(), format!("{number}\n"));
        }
    }

    #[test]
    fn a_guard_whose_pipe_closes_kills_the_group_and_removes_the_paths() {
        let dir = tempfile::tempdir().unwrap();
        let victim = dir.path().join("victim dir");
        std::fs::create_dir(&victim).unwrap();
        std::fs::write(victim.join("file"), "x").unwrap();
        let mut guard = Guard::new(&[&victim]).unwrap();
        // Two generations, as with mmdebstrap and apt.
        let mut command = shell("sleep 1000 & sleep 1000; true");
        guard.watch(command.process_group(0)).unwrap();
        let mut child = command.spawn().unwrap();
        drop(command); // it holds the pipe open as well
        drop(guard.pipe.take()); // as if we had been killed
        assert!(!child.wait().unwrap().success());
        guard.shell.wait().unwrap();
        assert!(!victim.exists());
        // Dead is enough: who reaps an orphan is not ours to say.
        let runs = |pid: &std::fs::DirEntry| {
            let stat = std::fs::read_to_string(pid.path().join("stat")).unwrap_or_default();
            let mut fields = stat.rsplit(')').next().unwrap_or_default().split_whitespace();
            let (state, _parent, group) = (fields.next(), fields.next(), fields.next());
            group == Some(child.id().to_string().as_str()) && state != Some("Z")
        };
        let left = std::fs::read_dir("/proc").unwrap().flatten().filter(runs).count();
        assert_eq!(left, 0, "the grandchild is gone too");
    }

    #[test]
    fn a_dropped_guard_leaves_everything_alone() {
        let dir = tempfile::tempdir().unwrap();
        drop(Guard::new(&[dir.path()]).unwrap());
        assert!(dir.path().exists());
    }
}
