// SPDX-License-Identifier: MIT OR Apache-2.0
//! `--vfio`: which device is handed over to the guest.

use std::fmt;

use serde::{Deserialize, Serialize};

use super::MachineName;
use crate::failure::{Failure, Result};
use crate::machine::kvm::Bdf;

/// Where QEMU puts its test device, and so its address in the outer guest.
const EDU: [&str; 1] = ["0000:00:04.0"];
/// Where it puts our functions.
const GPU: [&str; 2] = ["0000:00:04.0", "0000:00:05.0"];
/// QEMU's arguments for it. Its DMA reaches 256 MiB if nothing is said.
const EDU_DEVICE: &str = "edu,bus=pcie.0,addr=4,dma_mask=0xffffffff";

/// A device that is handed over.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Vfio {
    /// One of this host, or of the host the machine runs on.
    Host(Bdf),
    /// QEMU's test device, in the outer guest of a nested run.
    Edu,
    /// The testbench's own virtual GPU and its witness, likewise.
    Gpu,
}

impl Vfio {
    /// From the command line.
    ///
    /// # Errors
    /// If it is no device, or not one for this machine.
    pub fn new(text: &str, machine: MachineName, nested: bool) -> Result<Self> {
        if machine != MachineName::Kvm {
            return Err(Failure::usage(format!(
                "--vfio {text}: --machine {machine} gets its device over vfio-user and passes none of the host's through"
            ))
            .remedy("give --machine kvm"));
        }
        match (nested, text, text.parse()) {
            (true, "edu", _) => Ok(Self::Edu),
            (true, "gpu", _) => Ok(Self::Gpu),
            (true, ..) => {
                Err(Failure::usage(format!("--vfio {text}: the outer guest of --nested has no such device"))
                    .remedy(
                        "it has gpu, the testbench's own, and edu, QEMU's test device; a device of this host needs a run without --nested",
                    ))
            }
            (false, "edu" | "gpu", _) => {
                Err(Failure::usage(format!("--vfio {text}: only the outer guest of --nested has that device"))
                    .remedy("give --nested too, or the address of a device of this host"))
            }
            (false, _, Ok(bdf)) => Ok(Self::Host(bdf)),
            (false, _, Err(error)) => {
                Err(Failure::usage(format!("--vfio: {error}")).remedy("`lspci -D` lists addresses"))
            }
        }
    }

    /// The addresses where the machine runs.
    ///
    /// # Errors
    /// None but a defect.
    pub fn devices(&self) -> Result<Vec<Bdf>> {
        let parse = |all: &[&str]| all.iter().map(|text| text.parse()).collect::<Result<_, _>>();
        match self {
            Self::Host(bdf) => Ok(vec![*bdf]),
            Self::Edu => parse(&EDU),
            Self::Gpu => parse(&GPU),
        }
        .map_err(|error: String| Failure::environment(format!("a defect: {error}")))
    }

    /// QEMU's arguments for an outer guest that has it.
    #[must_use]
    pub fn outer_device(&self) -> Option<&'static str> {
        match self {
            Self::Host(_) | Self::Gpu => None,
            Self::Edu => Some(EDU_DEVICE),
        }
    }
}

impl fmt::Display for Vfio {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Host(bdf) => bdf.fmt(f),
            Self::Edu => f.write_str("edu"),
            Self::Gpu => f.write_str("gpu"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_machine_has_its_devices() {
        let host = Vfio::new("01:00.0", MachineName::Kvm, false).unwrap();
        assert_eq!(host.to_string(), "0000:01:00.0");
        let edu = Vfio::new("edu", MachineName::Kvm, true).unwrap();
        let addresses = |vfio: Vfio| vfio.devices().unwrap().iter().map(Bdf::to_string).collect::<Vec<_>>();
        assert_eq!(addresses(edu), EDU);
        assert_eq!(addresses(Vfio::new("gpu", MachineName::Kvm, true).unwrap()), GPU);
        for (text, machine, nested, said) in [
            ("01:00.0", MachineName::Qemu, false, "--machine qemu"),
            ("edu", MachineName::Qemu, true, "--machine qemu"),
            ("01:00.0", MachineName::Kvm, true, "no such device"),
            ("edu", MachineName::Kvm, false, "--nested"),
            ("01:00", MachineName::Kvm, false, "no PCI address"),
        ] {
            let failure = Vfio::new(text, machine, nested).unwrap_err();
            assert_eq!(failure.kind.exit_status(), 2);
            assert!(failure.what.contains(said), "{failure}");
        }
    }
}
