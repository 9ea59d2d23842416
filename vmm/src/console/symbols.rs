// SPDX-License-Identifier: MIT OR Apache-2.0
//! Lines of source for what a guest's kernel prints as `function+0x12/0x34 [module]`, and functions for what it prints as bare
//! addresses.
//!
//! The files with the answers are the kernel's ELF file with symbols, where there is one, and the modules that the guest loads.
//! A module is a relocatable file: its sections have no addresses, so each gets one here, and the references of the
//! debug information to them are filled in. All input is checked: a file that cannot be read answers nothing.

use std::borrow::Cow;
use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use gimli::{Dwarf, EndianArcSlice, LittleEndian, SectionId};
use object::elf::{R_X86_64_32, R_X86_64_32S, R_X86_64_64};
use object::read::elf::ElfFile64;
use object::{
    Architecture, Object, ObjectKind, ObjectSection, ObjectSymbol, RelocationFlags, RelocationTarget,
    SectionFlags, SectionIndex, SymbolKind,
};

type Reader = EndianArcSlice<LittleEndian>;

/// Places that were inlined into each other and are shown of one address at most.
const MAX_INLINED: usize = 3;
/// Where the first section of a relocatable file is taken to be; 0 stays for what has no address.
const FIRST_SECTION: u64 = 1 << 20;
/// Longest section of a relocatable file that gets an address.
const MAX_SECTION: u64 = 1 << 30;
/// A function's size in the kernel's words reaches to the next symbol: it may be so much more than the ELF file's.
const PADDING: u64 = 64;

/// Knows the guest's kernel and modules. Files are read when something in them is first asked for.
#[derive(Debug, Default)]
pub struct Symbols {
    kernel: Option<File>,
    modules: Vec<Module>,
}

/// A module that the guest loaded.
#[derive(Debug)]
pub struct Module {
    name: String,
    file: File,
    text: Option<u64>,
}

impl Module {
    /// A module by the name that the guest's kernel has for it, its file, and where its code began in the guest.
    #[must_use]
    pub fn new(name: String, file: PathBuf, text: Option<u64>) -> Self {
        Self { name, file: File::Unread(file), text }
    }
}

#[derive(Debug)]
enum File {
    Unread(PathBuf),
    Read(Option<Box<Image>>),
}

impl File {
    fn image(&mut self) -> Option<&Image> {
        if let Self::Unread(path) = self {
            *self = Self::Read(Image::read(path).ok().map(Box::new));
        }
        match self {
            Self::Read(image) => image.as_deref(),
            Self::Unread(_) => None,
        }
    }
}

impl Symbols {
    /// Symbols of a kernel's ELF file, and of modules.
    #[must_use]
    pub fn new(kernel: Option<PathBuf>, modules: Vec<Module>) -> Self {
        Self { kernel: kernel.map(File::Unread), modules }
    }

    /// The line with what is known of the places in it.
    pub fn line<'a>(&mut self, line: &'a str) -> Cow<'a, str> {
        // What the unwinder marks so was left on the stack by earlier calls: it makes reports long, and misleads.
        if line.trim_start().starts_with("? ") {
            return Cow::Borrowed(line);
        }
        let mut told = String::new();
        let mut from = 0;
        while let Some(place) = Place::find(line, from) {
            told.push_str(&line[from..place.end]);
            from = place.end;
            if let Some(text) = self.place(line, &place) {
                told.push_str(" (");
                told.push_str(&text);
                told.push(')');
            }
        }
        if told.len() == from {
            return Cow::Borrowed(line);
        }
        told.push_str(&line[from..]);
        Cow::Owned(told)
    }

    fn place(&mut self, line: &str, place: &Place<'_>) -> Option<String> {
        match place.what {
            What::Function { name, offset, size, module } => {
                let file = match module {
                    Some(module) => &mut self.modules.iter_mut().find(|known| known.name == module)?.file,
                    None => self.kernel.as_mut()?,
                };
                let image = file.image()?;
                image.lines(exact(line, image.address(name, size)?.checked_add(offset)?))
            }
            What::Address(address) => self.bare(line, address),
        }
    }

    /// What stands at an address: in a module if it is within one's code, else in the kernel.
    fn bare(&mut self, line: &str, address: u64) -> Option<String> {
        for module in &mut self.modules {
            let Some(inside) = module.text.and_then(|text| address.checked_sub(text)) else { continue };
            let told = module.file.image().and_then(|image| {
                let (base, size) = image.text?;
                if inside < size { image.at(line, base + inside) } else { None }
            });
            if let Some(told) = told {
                return Some(format!("{told} [{}]", module.name));
            }
        }
        self.kernel.as_mut()?.image()?.at(line, address)
    }
}

/// A stack holds addresses to return to: the call stands before them. Only the place of the fault itself is exact.
fn exact(line: &str, address: u64) -> u64 {
    let itself = line.contains("RIP:") || line.trim_start().starts_with("WARNING: ");
    if itself { address } else { address.saturating_sub(1) }
}

/// A place that a line names, and where its name ends.
struct Place<'a> {
    what: What<'a>,
    end: usize,
}

enum What<'a> {
    Function { name: &'a str, offset: u64, size: u64, module: Option<&'a str> },
    Address(u64),
}

impl<'a> Place<'a> {
    fn find(line: &'a str, from: usize) -> Option<Self> {
        let mut at = from;
        while let Some(found) = line[at..].find("0x").map(|found| found + at) {
            if let Some(place) = Self::function(line, found, from).or_else(|| Self::address(line, found)) {
                return Some(place);
            }
            at = found + 2;
        }
        None
    }

    /// `name+0x12/0x34`, perhaps with ` [module]` behind it.
    fn function(line: &'a str, at: usize, from: usize) -> Option<Self> {
        let before = line.get(from..at)?.strip_suffix('+')?;
        let is_name = |c: char| c.is_ascii_alphanumeric() || "_.$".contains(c);
        let name = &before[before.trim_end_matches(is_name).len()..];
        let (offset, end) = hex(line, at + 2)?;
        let (size, end) = hex(line, end + line.get(end..)?.starts_with("/0x").then_some(3)?)?;
        let module = line.get(end..).and_then(|rest| rest.strip_prefix(" [")).and_then(|rest| {
            let close = rest.find(']')?;
            // Build ids and taints may follow the name.
            let name = rest[..close].split([' ', '(']).next()?;
            Some((name, end + 2 + close + 1))
        });
        let (module, end) = module.map_or((None, end), |(name, end)| (Some(name), end));
        (!name.is_empty()).then_some(Self { what: What::Function { name, offset, size, module }, end })
    }

    /// `0xffffffff81234567`: an address in the kernel's half that has no name in front of it.
    fn address(line: &'a str, at: usize) -> Option<Self> {
        let (address, end) = hex(line, at + 2)?;
        let kernels = end - at == 18 && address >> 32 == 0xffff_ffff;
        (kernels && !line[..at].ends_with(['+', '/'])).then_some(Self { what: What::Address(address), end })
    }
}

/// A hexadecimal number, and where it ends.
fn hex(line: &str, at: usize) -> Option<(u64, usize)> {
    let rest = line.get(at..)?;
    let length = rest.find(|c: char| !c.is_ascii_hexdigit()).unwrap_or(rest.len());
    Some((u64::from_str_radix(&rest[..length], 16).ok()?, at + length))
}

#[derive(Debug)]
struct Symbol {
    address: u64,
    size: u64,
    name: String,
}

/// The functions of a file, and its lines if it has them.
struct Image {
    /// By address.
    symbols: Vec<Symbol>,
    by_name: HashMap<String, Vec<usize>>,
    lines: Option<addr2line::Context<Reader>>,
    /// Where the section `.text` is taken to begin, and its size.
    text: Option<(u64, u64)>,
}

impl std::fmt::Debug for Image {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Image({} symbols)", self.symbols.len())
    }
}

impl Image {
    fn read(path: &Path) -> Result<Self, String> {
        Self::parse(&std::fs::read(path).map_err(|error| error.to_string())?)
    }

    fn parse(bytes: &[u8]) -> Result<Self, String> {
        let file: ElfFile64<'_> = ElfFile64::parse(bytes).map_err(|error| error.to_string())?;
        if file.architecture() != Architecture::X86_64 {
            return Err("it is not for x86-64".into());
        }
        let bases = bases(&file);
        let mut symbols: Vec<Symbol> = file
            .symbols()
            .filter(|symbol| symbol.kind() == SymbolKind::Text)
            .filter_map(|symbol| {
                let base = symbol.section_index().and_then(|index| bases.get(&index)).copied().unwrap_or(0);
                let name = symbol.name().ok()?.to_owned();
                let address = symbol.address().checked_add(base).filter(|address| *address != 0)?;
                Some(Symbol { address, size: symbol.size(), name })
            })
            .collect();
        symbols.sort_by(|a, b| (a.address, &a.name).cmp(&(b.address, &b.name)));
        let mut by_name: HashMap<String, Vec<usize>> = HashMap::new();
        for (index, symbol) in symbols.iter().enumerate() {
            by_name.entry(symbol.name.clone()).or_default().push(index);
        }
        let load = |id: SectionId| -> Result<Reader, gimli::Error> {
            Ok(EndianArcSlice::new(Arc::from(section(&file, &bases, id.name())), LittleEndian))
        };
        let lines = Dwarf::load(load).and_then(addr2line::Context::from_dwarf).ok();
        let text = file.section_by_name(".text");
        let text = text.and_then(|text| Some((*bases.get(&text.index())?, text.size())));
        Ok(Self { symbols, by_name, lines, text })
    }

    /// Where a function begins, if there is one of this name and, of several, one of about this size.
    fn address(&self, name: &str, size: u64) -> Option<u64> {
        let named = self.by_name.get(name)?;
        let mut fitting = named
            .iter()
            .filter_map(|index| self.symbols.get(*index))
            .filter(|symbol| named.len() == 1 || (symbol.size <= size && size - symbol.size < PADDING));
        let first = fitting.next()?;
        // Two static functions of one name and size: nobody can tell.
        fitting.all(|other| other.address == first.address).then_some(first.address)
    }

    /// The function at an address, and the line.
    fn at(&self, line: &str, address: u64) -> Option<String> {
        let behind = self.symbols.partition_point(|symbol| symbol.address <= address);
        let symbol = self.symbols.get(behind.checked_sub(1)?)?;
        let offset = address - symbol.address;
        // A call that does not return may be a function's last instruction.
        if offset > symbol.size {
            return None;
        }
        let place = format!("{}+{offset:#x}", symbol.name);
        Some(
            self.lines(exact(line, address))
                .map_or_else(|| place.clone(), |lines| format!("{place}, {lines}")),
        )
    }

    /// `file:line`, innermost first where functions were inlined.
    fn lines(&self, address: u64) -> Option<String> {
        let mut frames = self.lines.as_ref()?.find_frames(address).skip_all_loads().ok()?;
        let mut told: Vec<String> = Vec::new();
        while let Ok(Some(frame)) = frames.next() {
            let Some(location) = frame.location else { continue };
            if let (Some(file), Some(line)) = (location.file, location.line) {
                if told.len() < MAX_INLINED {
                    told.push(format!("{}:{line}", shown(file)));
                }
            }
        }
        (!told.is_empty()).then(|| told.join(", in "))
    }
}

/// The addresses of a relocatable file's sections: one behind the other. Others have their addresses in themselves.
fn bases(file: &ElfFile64<'_>) -> HashMap<SectionIndex, u64> {
    let mut bases = HashMap::new();
    if file.kind() != ObjectKind::Relocatable {
        return bases;
    }
    let mut next = FIRST_SECTION;
    for section in file.sections() {
        let SectionFlags::Elf { sh_flags } = section.flags() else { continue };
        if sh_flags & u64::from(object::elf::SHF_ALLOC) != 0 && section.size() < MAX_SECTION {
            bases.insert(section.index(), next);
            next = next.saturating_add(section.size()).saturating_add(0x1000) & !0xfff;
        }
    }
    bases
}

/// A section of debug information; in a relocatable file with its references filled in.
fn section(file: &ElfFile64<'_>, bases: &HashMap<SectionIndex, u64>, name: &str) -> Vec<u8> {
    let Some(section) = file.section_by_name(name) else { return Vec::new() };
    let Ok(data) = section.data() else { return Vec::new() };
    let mut data = data.to_vec();
    if file.kind() != ObjectKind::Relocatable {
        return data;
    }
    for (offset, relocation) in section.relocations() {
        let RelocationTarget::Symbol(index) = relocation.target() else { continue };
        let Ok(symbol) = file.symbol_by_index(index) else { continue };
        let base = symbol.section_index().and_then(|index| bases.get(&index)).copied().unwrap_or(0);
        let value = symbol.address().wrapping_add(base).wrapping_add_signed(relocation.addend());
        let width = match relocation.flags() {
            RelocationFlags::Elf { r_type: R_X86_64_64 } => 8,
            RelocationFlags::Elf { r_type: R_X86_64_32 | R_X86_64_32S } => 4,
            _ => continue,
        };
        let place = usize::try_from(offset).ok().and_then(|at| data.get_mut(at..)?.get_mut(..width));
        if let Some(place) = place {
            place.copy_from_slice(&value.to_le_bytes()[..width]);
        }
    }
    data
}

/// A path as people know it: the places in which things are compiled mean nothing.
fn shown(path: &str) -> &str {
    // Ours are below `guest`; the kernel's below its sources, what was generated for it, or what modules are built against.
    let ours = ["driver", "witness", "include"].iter().find_map(|dir| {
        let at = path.rfind(&format!("/guest/{dir}/"))?;
        path.get(at + 1..)
    });
    let kernels = || {
        let (_, rest) = path
            .rsplit_once("/work/src/")
            .or_else(|| path.rsplit_once("/work/obj/"))
            .or_else(|| path.rsplit_once("/linux-headers-")?.1.split_once('/'))?;
        Some(rest)
    };
    let path = ours.or_else(kernels).unwrap_or(path);
    path.strip_prefix("./").unwrap_or(path)
}

#[cfg(test)]
#[path = "symbols_test.rs"]
mod tests;
