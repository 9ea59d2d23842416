// SPDX-License-Identifier: MIT OR Apache-2.0
//! Provisioning: everything a run needs and a fresh machine lacks, made once and kept in a cache folder.
//!
//! Why it is done this way: `docs/decisions/0001-provisioning.md`.

mod agent;
mod built;
mod cache;
mod debian;
mod hash;
mod kernel;
mod modfile;
mod modules;
pub mod mutants;
mod qemu;
mod sandbox;
mod source;
mod vmlinux;

use std::path::{Path, PathBuf};
use std::sync::Arc;

pub use cache::{Cache, Item, Made, Manifest, Partial, Wanted};
pub use kernel::{KERNELS, Kernel, NamedKernel};
pub(crate) use kernel::{cached as cached_kernels, is_for_outer_guests, refuse_outer};
pub(crate) use modfile::module_name;
pub use modfile::{ModuleInfo, check_module, is_module};
pub use modules::Modules;
pub use qemu::QemuProgram;
pub(crate) use qemu::cached as cached_qemu;
pub(crate) use sandbox::{bwrap_works, namespaces_remedy};
pub use source::source_tree;

use crate::event::EventSink;
use crate::failure::{Failure, Result};

/// Makes what is needed, or finds it made.
#[derive(Clone)]
pub struct Provisioner {
    cache: Cache,
    events: Arc<dyn EventSink>,
}

impl Provisioner {
    /// A provisioner that keeps what it makes in this cache and tells these events.
    #[must_use]
    pub fn new(cache: Cache, events: Arc<dyn EventSink>) -> Self {
        Self { cache, events }
    }

    /// Where things are kept.
    #[must_use]
    pub fn cache(&self) -> &Cache {
        &self.cache
    }

    /// Sees whether what the user named can be it, before anything is fetched or built: kernels by name or tree, patches.
    ///
    /// # Errors
    /// Usage, saying what is wrong with it.
    pub fn look(&self, kernels: &[String], patches: &[PathBuf]) -> Result<()> {
        kernels.iter().try_for_each(|kernel| kernel::look(kernel))?;
        modules::look(patches)
    }

    /// A QEMU with vfio-user: the system's if it has it, else a private one.
    ///
    /// # Errors
    /// When there is none and none can be fetched.
    pub fn qemu(&self) -> Result<QemuProgram> {
        qemu::provide(&self.cache, &self.events)
    }

    /// A guest kernel by name (see [`KERNELS`]), or the built kernel tree in a directory.
    ///
    /// # Errors
    /// Usage when it is neither; environment when it cannot be fetched.
    pub fn kernel(&self, name_or_tree: &str) -> Result<Kernel> {
        kernel::provide(&self.cache, &self.events, name_or_tree)
    }

    /// The guest's PID 1, built from this source tree.
    ///
    /// # Errors
    /// When cargo is missing or the build fails.
    pub fn agent(&self) -> Result<PathBuf> {
        agent::provide(&self.cache, &self.events)
    }

    /// The driver, with patches applied in order, and the witness, built for a kernel.
    ///
    /// # Errors
    /// Usage when a patch does not apply or a module does not compile.
    pub fn modules(&self, kernel: &Kernel, patches: &[PathBuf]) -> Result<Modules> {
        modules::provide(&self.cache, &self.events, kernel, patches)
    }

    /// The witness alone, for a run that brings its driver as a file.
    ///
    /// # Errors
    /// Usage when it does not compile.
    pub fn witness(&self, kernel: &Kernel) -> Result<PathBuf> {
        modules::witness(&self.cache, &self.events, kernel)
    }

    /// Everything at once, side by side: fetching and compiling do not wait for each other.
    ///
    /// # Errors
    /// The first failure, after everything begun has ended.
    pub fn everything(&self, kernels: &[String], patches: &[PathBuf]) -> Result<()> {
        self.look(kernels, patches)?;
        // Each thread forks and awaits its own children: they die with the thread that started them (process.rs).
        std::thread::scope(|scope| {
            let qemu = scope.spawn(|| self.qemu());
            let agent = scope.spawn(|| self.agent());
            let kernels: Vec<_> = kernels
                .iter()
                .map(|name| {
                    scope.spawn(move || {
                        let kernel = self.kernel(name)?;
                        if is_for_outer_guests(name) {
                            Ok(())
                        } else {
                            self.modules(&kernel, patches).map(drop)
                        }
                    })
                })
                .collect();
            let kernels: Vec<Result<()>> = kernels.into_iter().map(joined).collect();
            let (qemu, agent) = (joined(qemu), joined(agent));
            qemu?;
            agent?;
            kernels.into_iter().collect()
        })
    }
}

fn joined<T>(thread: std::thread::ScopedJoinHandle<'_, Result<T>>) -> Result<T> {
    thread
        .join()
        .unwrap_or_else(|_| Err(Failure::environment("a provisioning thread ended unexpectedly (a defect)")))
}

/// Reads a file that the user named.
fn read_input(what: &str, path: &Path) -> Result<Vec<u8>> {
    std::fs::read(path)
        .map_err(|error| Failure::usage(format!("cannot read {what} {}: {error}", path.display())))
}
