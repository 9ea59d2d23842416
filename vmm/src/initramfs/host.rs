// SPDX-License-Identifier: MIT OR Apache-2.0
//! Files of the host in the guest's first file system.

use std::collections::BTreeSet;
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use object::read::elf::{Dyn, ElfFile64, FileHeader, ProgramHeader};
use object::{Endianness, elf};

use super::{Initramfs, MAX_BYTES};
use crate::failure::{Failure, Result};

/// Splits `HOST[:GUEST]`. Without a guest path, a file or directory goes to `/add/NAME`.
///
/// # Errors
/// Usage when the host path has no name to go by.
pub fn parse_add(argument: &str) -> Result<(PathBuf, String)> {
    // A file whose name has a colon is still found by its whole name.
    if !Path::new(argument).exists() {
        if let Some((host, guest)) = argument.rsplit_once(':') {
            if guest.starts_with('/') && !host.is_empty() {
                return Ok((host.into(), guest.to_owned()));
            }
            return Err(Failure::usage(format!(
                "'{argument}': the guest's path must be absolute, as in HOST:/GUEST"
            )));
        }
    }
    // The name that was typed, also where it is a link's: nobody looks for /bin/sh under /add/dash. `.` and `..` have none.
    let path = Path::new(argument);
    let typed = path.exists().then(|| path.file_name()).flatten().map(ToOwned::to_owned);
    let name = typed
        .or_else(|| path.canonicalize().ok()?.file_name().map(ToOwned::to_owned))
        .and_then(|name| name.into_string().ok());
    match name {
        Some(name) => Ok((argument.into(), format!("/add/{name}"))),
        None => {
            Err(Failure::usage(format!("'{argument}' is not a file or directory here that can be added")))
        }
    }
}

impl Initramfs {
    /// Adds a file or directory of the host. The named path itself may be a symbolic link and is followed; links
    /// inside a directory stay links.
    ///
    /// # Errors
    /// Usage when something cannot be read, is neither file, directory nor link, or needs a library that is not found.
    pub fn add_host(&mut self, host: &Path, guest: &str) -> Result<&mut Self> {
        let mut programs = BTreeSet::new();
        let path = host.canonicalize().map_err(|e| cannot("add", host, &e))?;
        self.add_path(&path, guest, &mut programs)?;
        for program in programs {
            self.add_libraries(&program)?;
        }
        Ok(self)
    }

    fn add_path(&mut self, host: &Path, guest: &str, programs: &mut BTreeSet<PathBuf>) -> Result<()> {
        let meta = fs::symlink_metadata(host).map_err(|e| cannot("add", host, &e))?;
        let mode = meta.permissions().mode();
        if meta.is_dir() {
            self.dir(guest, mode)?;
            let entries = fs::read_dir(host).and_then(Iterator::collect::<std::io::Result<Vec<_>>>);
            for entry in entries.map_err(|e| cannot("read the directory", host, &e))? {
                let name = entry.file_name();
                let name = name.to_str().ok_or_else(|| {
                    Failure::usage(format!("{} has a name that is not UTF-8", entry.path().display()))
                })?;
                self.add_path(&entry.path(), &format!("{guest}/{name}"), programs)?;
            }
        } else if meta.is_symlink() {
            let target = fs::read_link(host).map_err(|e| cannot("read the link", host, &e))?;
            self.symlink(guest, &target.to_string_lossy())?;
        } else if meta.is_file() {
            if meta.len() > MAX_BYTES {
                return Err(Failure::usage(format!(
                    "{} is too large for the guest's memory",
                    host.display()
                )));
            }
            let bytes = fs::read(host).map_err(|e| cannot("read", host, &e))?;
            // Libraries among what is added need theirs as well, so the mode does not matter.
            if bytes.starts_with(b"\x7fELF") {
                programs.insert(host.to_owned());
            }
            self.file(guest, mode, bytes)?;
        } else {
            return Err(Failure::usage(format!(
                "{} is neither a file, a directory nor a symbolic link, and cannot be added",
                host.display()
            )));
        }
        Ok(())
    }

    /// Adds loader and libraries of a dynamically linked file, at the paths where its loader looks for them.
    fn add_libraries(&mut self, program: &Path) -> Result<()> {
        let mut pending = vec![program.to_owned()];
        let mut seen = BTreeSet::new();
        while let Some(file) = pending.pop() {
            let Some(needs) = needs(&file) else { continue };
            let mut found: Vec<PathBuf> = needs.interpreter.iter().cloned().collect();
            for name in &needs.libraries {
                if !seen.insert(name.clone()) {
                    continue;
                }
                let library = search(name, &needs, &file).ok_or_else(|| {
                    Failure::usage(format!(
                        "{} needs the library {name}, which is not in this host's library folders",
                        file.display()
                    ))
                    .remedy("link the program statically, or add its library with --add HOST:/usr/lib/NAME")
                })?;
                // One that was added by hand at a place the loader knows is enough.
                found.push(library);
            }
            for library in found {
                let Some(guest) = library.to_str() else { continue };
                if !self.contains(guest) {
                    let bytes = fs::read(&library).map_err(|e| cannot("read", &library, &e))?;
                    self.file(guest, 0o755, bytes)?;
                    pending.push(library);
                }
            }
        }
        Ok(())
    }
}

/// What a file's dynamic section asks for.
#[derive(Debug, Default)]
struct Needs {
    interpreter: Option<PathBuf>,
    libraries: Vec<String>,
    search: Vec<String>,
}

/// The loader that a program names.
pub(crate) fn interpreter(program: &Path) -> Option<PathBuf> {
    needs(program)?.interpreter
}

/// None when the file is not dynamic, or not for this processor.
fn needs(file: &Path) -> Option<Needs> {
    let bytes = fs::read(file).ok()?;
    let parsed: ElfFile64<'_> = ElfFile64::parse(&*bytes).ok()?;
    let header = parsed.elf_header();
    let endian = header.endian().ok()?;
    if header.e_machine.get(endian) != elf::EM_X86_64 {
        return None;
    }
    let segments = header.program_headers(endian, &*bytes).ok()?;
    let mut needs = Needs::default();
    let mut is_dynamic = false;
    for segment in segments {
        if let Ok(Some(path)) = segment.interpreter(endian, &*bytes) {
            needs.interpreter = std::str::from_utf8(path).ok().map(PathBuf::from);
        }
        if let Ok(Some(table)) = segment.dynamic(endian, &*bytes) {
            is_dynamic = true;
            read_dynamic(table, segments, endian, &bytes, &mut needs);
        }
    }
    is_dynamic.then_some(needs)
}

type Segment = elf::ProgramHeader64<Endianness>;

fn read_dynamic(
    table: &[elf::Dyn64<Endianness>],
    segments: &[Segment],
    endian: Endianness,
    bytes: &[u8],
    needs: &mut Needs,
) {
    let value = |tag: u32| table.iter().find(|d| d.d_tag(endian) == u64::from(tag)).map(|d| d.d_val(endian));
    // The dynamic section speaks in addresses; the file has offsets.
    let Some(strings) = value(elf::DT_STRTAB).and_then(|address| {
        segments
            .iter()
            .find_map(|s| s.data_range(endian, bytes, address, 1).ok().flatten().map(|_| (s, address)))
    }) else {
        return;
    };
    let (segment, address) = strings;
    let start = segment.p_offset(endian).wrapping_add(address.wrapping_sub(segment.p_vaddr(endian)));
    let string = |offset: u64| -> Option<String> {
        let at = usize::try_from(start.checked_add(offset)?).ok()?;
        let rest = bytes.get(at..)?;
        let end = rest.iter().position(|byte| *byte == 0)?;
        String::from_utf8(rest[..end].to_vec()).ok()
    };
    for entry in table {
        let tag = u32::try_from(entry.d_tag(endian)).unwrap_or(u32::MAX);
        match tag {
            elf::DT_NEEDED => needs.libraries.extend(string(entry.d_val(endian))),
            elf::DT_RPATH | elf::DT_RUNPATH => {
                let path = string(entry.d_val(endian)).unwrap_or_default();
                needs.search.extend(path.split(':').filter(|dir| !dir.is_empty()).map(str::to_owned));
            }
            _ => {}
        }
    }
}

/// Finds a library as the loader in the guest will: by the file's own search path, then in the folders built into it.
fn search(name: &str, needs: &Needs, file: &Path) -> Option<PathBuf> {
    if name.contains('/') {
        return Some(PathBuf::from(name)).filter(|path| path.is_file());
    }
    let origin = file.parent().and_then(Path::to_str).unwrap_or("/");
    let own = needs.search.iter().map(|dir| dir.replace("$ORIGIN", origin).replace("${ORIGIN}", origin));
    let built_in = [
        "/lib/x86_64-linux-gnu",
        "/usr/lib/x86_64-linux-gnu",
        "/lib64",
        "/usr/lib64",
        "/lib",
        "/usr/lib",
        "/usr/local/lib",
    ];
    own.chain(built_in.map(str::to_owned))
        .map(|dir| Path::new(&dir).join(name))
        .find(|path| path.is_absolute() && path.is_file())
}

fn cannot(doing: &str, path: &Path, error: &std::io::Error) -> Failure {
    Failure::usage(format!("cannot {doing} {}: {error}", path.display()))
}
