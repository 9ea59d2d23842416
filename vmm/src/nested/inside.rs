// SPDX-License-Identifier: MIT OR Apache-2.0
//! The outer guest's side of a nested run: this program as PID 1.
//!
//! One lock: the line's, held while one frame is written and taken with no other lock held.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use nix::kmod::{ModuleInitFlags, finit_module};
use nix::mount::{MsFlags, mount};
use nix::sys::reboot::{RebootMode, reboot};
use parking_lot::Mutex;

use super::frame::{Frame, Hello, InnerEvent, MAX_LOG, VERSION};
use super::{Errand, Order, PORT, place};
use crate::bench;
use crate::cli::vfio::Vfio;
use crate::event::{Event, EventSink};
use crate::failure::{Failure, Result};
use crate::machine::kvm::{self, KvmOptions};
use crate::machine::{MachineConfig, MachineExit};
use crate::provision::{Kernel, Modules, QemuProgram};
use crate::report::results::{Results, Verdict};
use crate::runner;
use crate::runner::parts::Parts;
use crate::runner::{accel, plan};

/// How long the port may take to appear, and the host to say that it has the results.
const PATIENCE: Duration = Duration::from_secs(20);
/// How often the host is told that somebody lives here.
const ALIVE: Duration = Duration::from_secs(1);
/// How often wishes of the host are looked for.
const LOOK: Duration = Duration::from_millis(100);
/// Whether memory that is a file gets large pages.
const HUGE_FILES: &str = "/sys/kernel/mm/transparent_hugepage/shmem_enabled";
/// A module that the kernel is to decompress itself.
const COMPRESSED_FILE: u32 = 4;

/// Is PID 1 of the outer guest, to the end.
///
/// # Errors
/// If this is not PID 1. Everything later is said on the line, or on the console if there is none, and the machine is switched
/// off.
pub fn main() -> Result<u8> {
    if std::process::id() != 1 {
        return Err(Failure::usage(format!("{} is for the outer guest's PID 1 only", super::COMMAND))
            .remedy("give `run --nested` instead"));
    }
    if let Err(failure) = serve() {
        // The console is standard error, and the host keeps it.
        let _ = writeln!(io::stderr(), "hmm-testbench, inside: {failure}");
    }
    nix::unistd::sync();
    let _ = reboot(RebootMode::RB_POWER_OFF);
    // Whoever cannot switch off must not end either: the kernel would panic.
    loop {
        std::thread::sleep(PATIENCE);
    }
}

fn serve() -> Result<()> {
    mount_all()?;
    let port = open_port()?;
    let trouble = |error: io::Error| Failure::environment(format!("the line to the host: {error}"));
    let reader = port.try_clone().map_err(trouble)?;
    let line = Arc::new(Line { port: Mutex::new(port) });
    line.send(&Frame::Hello(Hello { version: VERSION, kernel: release() }));
    let interrupted = Arc::new(AtomicBool::new(false));
    let (received, receipt) = sync_channel(1);
    let nmi = Arc::new(AtomicBool::new(false));
    listen(reader, Arc::clone(&interrupted), Arc::clone(&nmi), received)?;
    beat(Arc::clone(&line))?;
    let last = make(&line, &interrupted, &nmi)?;
    line.send(&last);
    wait_for_receipt(&receipt);
    Ok(())
}

/// The way to the host, shared by all who have something to say.
struct Line {
    port: Mutex<File>,
}

impl Line {
    /// Sends a frame. A host that is gone takes this machine with it, so errors are nobody's to handle.
    fn send(&self, frame: &Frame) {
        match frame.encode() {
            Ok(bytes) => drop(self.port.lock().write_all(&bytes)),
            Err(error) => drop(writeln!(io::stderr(), "hmm-testbench, inside: {error}")),
        }
    }
}

impl EventSink for Line {
    fn event(&self, event: Event) {
        let event = match event {
            Event::Note { text } => InnerEvent::Note { text },
            Event::Console { line } => InnerEvent::Console { line },
            Event::Guest { message } => InnerEvent::Guest { message },
            Event::Violation { violation } => InnerEvent::Violation { violation },
            // Nothing is provisioned here, and nothing nests twice.
            Event::StepStart { .. }
            | Event::StepProgress { .. }
            | Event::StepEnd { .. }
            | Event::Nested { .. } => return,
        };
        self.send(&Frame::Event(Box::new(event)));
    }
}

/// Makes or carries the run; a failure is part of what came of it. The last frame to send.
fn make(line: &Arc<Line>, interrupted: &AtomicBool, nmi: &AtomicBool) -> Result<Frame> {
    let order: Order = serde_json::from_slice(&read(Path::new(place::ORDER))?)
        .map_err(|error| Failure::environment(format!("the order cannot be read (a defect): {error}")))?;
    if order.config.vfio == Some(Vfio::Gpu) {
        let exit = carry(&order, line, interrupted, nmi).unwrap_or_else(|failure| MachineExit::Died {
            status: format!("it could not be started in the outer guest: {failure}"),
            stderr_tail: String::new(),
        });
        return Ok(Frame::Exit(Box::new(exit)));
    }
    let made = match order.errand {
        Errand::Run => carry_out(&order, line, interrupted),
        Errand::Measure => measure(&order, line, interrupted),
    };
    let results = made.unwrap_or_else(|failure| runner::not_made(&order.config, &failure));
    Ok(Frame::Results(Box::new(results)))
}

fn prepare(order: &Order) -> Result<()> {
    // A guest's first touch of a page leaves it, which costs a hundred microseconds on this processor: so large pages. And where
    // devices are handed over, each piece of memory that the IOMMU knows is a message of QEMU's to the functions' server: large
    // pages make that hundreds of them, not hundreds of thousands.
    fs::write(HUGE_FILES, "always")
        .map_err(|error| Failure::environment(format!("cannot write {HUGE_FILES}: {error}")))?;
    for module in &order.modules {
        load(module)?;
    }
    for device in order.config.vfio.as_ref().map_or(Ok(Vec::new()), Vfio::devices)? {
        hand_over(Path::new("/sys/bus/pci"), &device.to_string())?;
    }
    Ok(())
}

/// Runs the machine of a run that the host makes: its functions are the outer guest's devices.
fn carry(order: &Order, line: &Arc<Line>, interrupted: &AtomicBool, nmi: &AtomicBool) -> Result<MachineExit> {
    prepare(order)?;
    let accel = accel::choose_inside()?.accel;
    let config = &order.config;
    let parts = parts(order);
    let console = Arc::clone(line);
    let machine = MachineConfig {
        kernel: parts.kernel.image.clone(),
        initramfs: open(place::INITRAMFS)?,
        cmdline: plan::cmdline(config.append.as_deref()),
        cpus: config.cpus,
        memory_bytes: config.memory_bytes,
        nodes: config.nodes,
        accel,
        functions: Vec::new(),
        console: Box::new(move |bytes| {
            bytes.chunks(MAX_LOG).for_each(|part| console.send(&Frame::Log(part.to_vec())));
        }),
        interactive: false,
    };
    let vfio = runner::handover(config, line.as_ref())?;
    let mut machine = kvm::start(KvmOptions { emulated_svm: true, vfio, ..KvmOptions::default() }, machine)?;
    loop {
        if let Some(exit) = machine.wait(LOOK) {
            return Ok(exit);
        }
        if interrupted.load(Ordering::SeqCst) {
            machine.kill();
        }
        if nmi.swap(false, Ordering::SeqCst) {
            machine.nmi()?;
        }
    }
}

fn open(path: &str) -> Result<File> {
    File::open(path).map_err(|error| Failure::environment(format!("cannot open {path}: {error}")))
}

fn carry_out(order: &Order, line: &Arc<Line>, interrupted: &AtomicBool) -> Result<Results> {
    prepare(order)?;
    let parts = parts(order);
    let initramfs = open(place::INITRAMFS)?;
    let (log, copier) = log(Arc::clone(line))?;
    let keep = |trace: &[u8]| {
        trace.chunks(MAX_LOG).for_each(|part| line.send(&Frame::Trace(part.to_vec())));
    };
    let outcome =
        runner::run_inside(&order.config, &parts, initramfs, log, &keep, line.as_ref(), interrupted);
    // All of the log is on the line before the results are. Its writing end went with the run.
    let _ = copier.join();
    Ok(outcome.results)
}

/// Makes no run, but measures. That all was measured is the verdict.
fn measure(order: &Order, line: &Arc<Line>, interrupted: &AtomicBool) -> Result<Results> {
    prepare(order)?;
    line.event(Event::Note { text: accel::choose_inside()?.reason });
    bench::nested::inside::measure(&order.config, &parts(order), line.as_ref(), interrupted)?;
    let mut results = runner::blank(&order.config);
    (results.verdict, results.exit_status) = (Verdict::Clean, 0);
    Ok(results)
}

/// The parts as they lie here. Agent and modules are in the initramfs already.
fn parts(order: &Order) -> Parts {
    let none = || PathBuf::from("/nonexistent");
    Parts {
        qemu: order.qemu.as_ref().map(|qemu| QemuProgram {
            program: qemu.program.clone(),
            args: qemu.args.iter().map(Into::into).collect(),
            env: Vec::new(),
            version: qemu.version.clone(),
            origin: "in the outer guest".into(),
        }),
        kernel: Kernel::image_only(
            order.kernel_name.clone(),
            order.kernel_release.clone(),
            place::KERNEL.into(),
        ),
        agent: none(),
        modules: Modules { driver: none(), witness: none() },
    }
}

fn mount_all() -> Result<()> {
    for (kind, on) in [("proc", "/proc"), ("sysfs", "/sys"), ("devtmpfs", "/dev"), ("tmpfs", "/tmp")] {
        mount(Some(kind), on, Some(kind), MsFlags::empty(), None::<&str>)
            .map_err(|error| Failure::environment(format!("cannot mount {on}: {error}")))?;
    }
    Ok(())
}

/// The port of our name, which the kernel may still be finding.
fn open_port() -> Result<File> {
    let begin = Instant::now();
    loop {
        if let Some(device) = find_port(Path::new("/sys/class/virtio-ports")) {
            match OpenOptions::new().read(true).write(true).open(&device) {
                Ok(port) => return Ok(port),
                Err(error) if begin.elapsed() >= PATIENCE => {
                    return Err(Failure::environment(format!("cannot open {}: {error}", device.display())));
                }
                Err(_) => {}
            }
        }
        if begin.elapsed() >= PATIENCE {
            return Err(Failure::environment(format!("there is no port {PORT}")));
        }
        std::thread::sleep(Duration::from_millis(20));
    }
}

fn find_port(class: &Path) -> Option<PathBuf> {
    let mut ports = fs::read_dir(class).ok()?.flatten();
    let ours = ports
        .find(|port| fs::read_to_string(port.path().join("name")).is_ok_and(|name| name.trim() == PORT))?;
    Some(Path::new("/dev").join(ours.file_name()))
}

/// Loads a module, which may be compressed.
fn load(module: &Path) -> Result<()> {
    let trouble = |error: String| Failure::environment(format!("cannot load {}: {error}", module.display()));
    let file = File::open(module).map_err(|error| trouble(error.to_string()))?;
    let flags = if module.extension().is_some_and(|end| end == "ko") { 0 } else { COMPRESSED_FILE };
    finit_module(&file, c"", ModuleInitFlags::from_bits_retain(flags))
        .map_err(|error| trouble(error.to_string()))
}

/// Binds a device to the driver that hands it on.
fn hand_over(bus: &Path, device: &str) -> Result<()> {
    let folder = bus.join("devices").join(device);
    let write = |path: PathBuf, what: &str| {
        fs::write(&path, what)
            .map_err(|error| Failure::environment(format!("cannot write {}: {error}", path.display())))
    };
    write(folder.join("driver_override"), "vfio-pci")?;
    if folder.join("driver").exists() {
        write(folder.join("driver/unbind"), device)?;
    }
    write(bus.join("drivers_probe"), device)
}

/// Follows what the host says. When it is gone, the run ends too.
fn listen(
    mut port: File,
    interrupted: Arc<AtomicBool>,
    nmi: Arc<AtomicBool>,
    received: SyncSender<()>,
) -> Result<()> {
    thread("line", move || {
        loop {
            match Frame::read(&mut port) {
                Ok(Some(Frame::Nmi)) => nmi.store(true, Ordering::SeqCst),
                Ok(Some(Frame::Received)) => drop(received.try_send(())),
                Ok(Some(Frame::Interrupt)) | Err(_) | Ok(None) => {
                    interrupted.store(true, Ordering::SeqCst);
                }
                Ok(Some(_)) => {}
            }
            // A port whose host end is closed reads as ended at once, for ever.
            std::thread::sleep(Duration::from_millis(10));
        }
    })
    .map(drop)
}

fn beat(line: Arc<Line>) -> Result<()> {
    thread("alive", move || {
        loop {
            line.send(&Frame::Alive);
            std::thread::sleep(ALIVE);
        }
    })
    .map(drop)
}

/// A file whose bytes become frames.
fn log(line: Arc<Line>) -> Result<(File, JoinHandle<()>)> {
    let (reader, writer) = nix::unistd::pipe2(nix::fcntl::OFlag::O_CLOEXEC)
        .map_err(|error| Failure::environment(format!("no pipe for the log: {error}")))?;
    let mut reader = File::from(reader);
    let copier = thread("log", move || {
        let mut buffer = vec![0; MAX_LOG];
        loop {
            match reader.read(&mut buffer) {
                Ok(count @ 1..) => line.send(&Frame::Log(buffer[..count].to_vec())),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Ok(0) | Err(_) => return,
            }
        }
    })?;
    Ok((File::from(writer), copier))
}

fn thread(name: &str, body: impl FnOnce() + Send + 'static) -> Result<JoinHandle<()>> {
    std::thread::Builder::new()
        .name(name.into())
        .spawn(body)
        .map_err(|error| Failure::environment(format!("cannot start a thread: {error}")))
}

fn wait_for_receipt(receipt: &Receiver<()>) {
    // Without one the host has lost interest, and switching off is right all the same.
    let _ = receipt.recv_timeout(PATIENCE);
}

fn release() -> String {
    fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default().trim().to_owned()
}

fn read(path: &Path) -> Result<Vec<u8>> {
    fs::read(path).map_err(|error| Failure::environment(format!("cannot read {}: {error}", path.display())))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_pid_1_is_pid_1() {
        let failure = main().unwrap_err();
        assert_eq!(failure.kind.exit_status(), 2);
        assert!(failure.to_string().contains("--nested"));
    }

    #[test]
    fn a_port_is_found_by_its_name() {
        let class = tempfile::tempdir().unwrap();
        assert_eq!(find_port(&class.path().join("none")), None);
        for (port, name) in [("vport1p1", "other\n"), ("vport2p1", "hmm-testbench.line\n")] {
            fs::create_dir(class.path().join(port)).unwrap();
            fs::write(class.path().join(port).join("name"), name).unwrap();
        }
        assert_eq!(find_port(class.path()), Some("/dev/vport2p1".into()));
    }
}
