// SPDX-License-Identifier: MIT OR Apache-2.0
//! What a run is made of: QEMU, kernel, modules, the guest's program, and the initramfs with all of it.

use std::fs::File;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{RecvTimeoutError, channel};
use std::time::Duration;

use guest_protocol::{DRIVER_MODULE, KERNEL_MODULES, MODULES_DIR, PLAN_PATH, Plan, WITNESS_MODULE};

use super::RunConfig;
use super::device::memfd;
use super::shell;
use crate::cli::MachineName;
use crate::cli::units::show_size;
use crate::event::EventSink;
use crate::failure::{Failure, Result};
use crate::initramfs::Initramfs;
use crate::provision::{Cache, Kernel, Modules, Provisioner, QemuProgram, check_module, is_module};

/// The parts.
#[derive(Clone, Debug)]
pub struct Parts {
    /// The emulator, if the run needs one.
    pub qemu: Option<QemuProgram>,
    /// The kernel.
    pub kernel: Kernel,
    /// The guest's PID 1.
    pub agent: PathBuf,
    /// Driver and witness.
    pub modules: Modules,
}

/// Gets the parts, unless it is interrupted.
pub fn gather(config: &RunConfig, events: Arc<dyn EventSink>, interrupted: &AtomicBool) -> Result<Parts> {
    let provisioner = Provisioner::new(Cache::from_env()?, events);
    let wanted = config.clone();
    let (sender, receiver) = channel();
    // On a thread of its own, so that Ctrl-C need not wait for a download: its children die with it.
    std::thread::spawn(move || {
        let _ = sender.send(provide(&provisioner, &wanted));
    });
    loop {
        match receiver.recv_timeout(Duration::from_millis(100)) {
            Ok(parts) => return parts,
            Err(RecvTimeoutError::Disconnected) => {
                return Err(Failure::environment("the provisioning thread ended unexpectedly (a defect)"));
            }
            Err(RecvTimeoutError::Timeout) if interrupted.load(Ordering::Relaxed) => {
                return Err(Failure::inconclusive("interrupted while the parts were made"));
            }
            Err(RecvTimeoutError::Timeout) => {}
        }
    }
}

fn provide(provisioner: &Provisioner, config: &RunConfig) -> Result<Parts> {
    let emulated = config.machine == MachineName::Qemu || config.nested;
    // Nobody waits for a download to be told that a name is wrong.
    provisioner.look(std::slice::from_ref(&config.kernel), &config.patches)?;
    if let Some(driver) = &config.driver {
        is_module(driver)?;
    }
    if let Some(qemu) = emulated.then(QemuProgram::named).flatten() {
        qemu?;
    }
    std::thread::scope(|scope| {
        let qemu = emulated.then(|| scope.spawn(|| provisioner.qemu()));
        let agent = scope.spawn(|| provisioner.agent());
        let kernel = provisioner.kernel(&config.kernel)?;
        let modules = match &config.driver {
            None => provisioner.modules(&kernel, &config.patches)?,
            // The driver is there: only the witness is built.
            Some(driver) => {
                check_module(driver, &kernel)?;
                Modules { driver: driver.clone(), witness: provisioner.witness(&kernel)? }
            }
        };
        let ended = || Failure::environment("a provisioning thread ended unexpectedly (a defect)");
        Ok(Parts {
            qemu: qemu.map(|qemu| qemu.join().map_err(|_| ended())?).transpose()?,
            agent: agent.join().map_err(|_| ended())??,
            kernel,
            modules,
        })
    })
}

impl Parts {
    /// The emulator of a run that needs one.
    pub fn qemu(&self) -> Result<&QemuProgram> {
        self.qemu.as_ref().ok_or_else(|| Failure::environment("no QEMU was provided (a defect)"))
    }

    /// The machine's version, and where it is from.
    #[must_use]
    pub fn machine(&self) -> (String, String) {
        match &self.qemu {
            Some(qemu) => (qemu.version.clone(), format!("qemu {} ({})", qemu.version, qemu.origin)),
            None => (env!("CARGO_PKG_VERSION").to_owned(), "the testbench's own machine".to_owned()),
        }
    }
}

/// The guest's first file system, as an anonymous file.
pub fn initramfs(config: &RunConfig, parts: &Parts, plan: &Plan) -> Result<File> {
    let plan = serde_json::to_vec(plan)
        .map_err(|error| Failure::environment(format!("cannot write the plan (a defect): {error}")))?;
    let mut tree = Initramfs::new();
    for dir in ["/dev", "/proc", "/sys", "/tmp", "/run", "/root", "/etc"] {
        tree.dir(dir, 0o755)?;
    }
    for add in &config.add {
        tree.add_host(&add.host, &add.guest)?;
    }
    if config.shell {
        shell::add(&mut tree)?;
    }
    // The testbench's own come last: what the user adds does not replace them.
    // The console is opened by the kernel for PID 1 before anything is mounted.
    tree.node("/dev/console", 0o600, 5, 1)?;
    tree.file("/init", 0o755, read(&parts.agent)?)?;
    tree.file(PLAN_PATH, 0o644, plan)?;
    tree.file(DRIVER_MODULE, 0o644, read(&parts.modules.driver)?)?;
    tree.file(WITNESS_MODULE, 0o644, read(&parts.modules.witness)?)?;
    for module in KERNEL_MODULES {
        add_kernel_module(&mut tree, &parts.kernel, module)?;
    }
    let bytes = tree.finish()?;
    // The archive is unpacked into the guest's memory, beside which the guest has to live.
    if bytes.len() as u64 > config.memory_bytes / 3 {
        return Err(Failure::usage(format!(
            "the guest's files are {} MiB, too much for {} of memory",
            bytes.len() >> 20,
            show_size(config.memory_bytes)
        ))
        .remedy("give it more with --memory, or add less with --add"));
    }
    let mut file = memfd("hmm-testbench-initramfs", 0)?;
    file.write_all(&bytes)
        .map_err(|error| Failure::environment(format!("cannot keep the initramfs in memory: {error}")))?;
    Ok(file)
}

/// A module that the kernel came with, as its package has it. Without one the workloads that want it say so in their cases.
fn add_kernel_module(tree: &mut Initramfs, kernel: &Kernel, module: &str) -> Result<()> {
    let Some(dir) = kernel.modules_dir() else { return Ok(()) };
    let name = module.rsplit('/').next().unwrap_or(module);
    for ending in ["ko", "ko.xz"] {
        let path = dir.join("kernel").join(format!("{module}.{ending}"));
        if path.is_file() {
            tree.file(&format!("{MODULES_DIR}/{name}.{ending}"), 0o644, read(&path)?)?;
        }
    }
    Ok(())
}

fn read(path: &Path) -> Result<Vec<u8>> {
    std::fs::read(path)
        .map_err(|error| Failure::environment(format!("cannot read {}: {error}", path.display())))
}
