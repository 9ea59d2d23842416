// SPDX-License-Identifier: MIT OR Apache-2.0
//! What a kernel module's file says about itself, for modules that the user brings.

use std::path::Path;

use object::read::elf::ElfFile64;
use object::{Architecture, Object, ObjectKind, ObjectSection};

use super::kernel::Kernel;
use super::read_input;
use crate::failure::{Failure, Result};

/// A module's description of itself.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ModuleInfo {
    /// Its name.
    pub name: Option<String>,
    /// The kernel it was built for: release, then features.
    pub vermagic: String,
}

impl ModuleInfo {
    /// The release it was built for.
    #[must_use]
    pub fn release(&self) -> &str {
        self.vermagic.split_whitespace().next().unwrap_or_default()
    }
}

/// Checks that a file is a kernel module, for whichever kernel.
///
/// # Errors
/// Usage, saying what it is instead.
pub fn is_module(file: &Path) -> Result<ModuleInfo> {
    parse(&read_input("the module", file)?)
        .map_err(|why| Failure::usage(format!("{} is not a kernel module: {why}", file.display())))
}

/// Checks that a file is a kernel module for this kernel.
///
/// # Errors
/// Usage, saying what it is instead.
pub fn check_module(file: &Path, kernel: &Kernel) -> Result<ModuleInfo> {
    let info = is_module(file)?;
    if info.release() != kernel.release {
        return Err(Failure::usage(format!(
            "{} was built for kernel {}, but the guest's is {}",
            file.display(),
            info.release(),
            kernel.release
        ))
        .remedy("build it for that kernel, or choose another with --kernel"));
    }
    Ok(info)
}

/// The name that the guest's kernel has for a module, if the file is one.
pub(crate) fn module_name(file: &Path) -> Option<String> {
    parse(&std::fs::read(file).ok()?).ok()?.name
}

fn parse(bytes: &[u8]) -> Result<ModuleInfo, String> {
    if bytes.starts_with(b"\xfd7zXZ")
        || bytes.starts_with(b"\x1f\x8b")
        || bytes.starts_with(b"\x28\xb5\x2f\xfd")
    {
        return Err("it is compressed; unpack it first (unxz, gunzip or unzstd)".into());
    }
    let file: ElfFile64<'_> = ElfFile64::parse(bytes).map_err(|error| error.to_string())?;
    if file.architecture() != Architecture::X86_64 || file.kind() != ObjectKind::Relocatable {
        return Err("it is no relocatable x86-64 object".into());
    }
    let section = file.section_by_name(".modinfo").ok_or("it has no .modinfo section")?;
    let data = section.data().map_err(|error| error.to_string())?;
    let value = |key: &str| {
        data.split(|byte| *byte == 0)
            .filter_map(|field| std::str::from_utf8(field).ok())
            .find_map(|field| field.strip_prefix(key).and_then(|rest| rest.strip_prefix('=')))
            .map(str::to_owned)
    };
    let vermagic = value("vermagic").ok_or("its .modinfo has no vermagic")?;
    Ok(ModuleInfo { name: value("name"), vermagic })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_no_module_is_said() {
        assert!(parse(b"hello").is_err());
        assert!(parse(b"\xfd7zXZ\0 and so on").unwrap_err().contains("compressed"));
        let ourselves = std::fs::read("/proc/self/exe").unwrap();
        assert!(parse(&ourselves).unwrap_err().contains("relocatable"));
    }
}
