// SPDX-License-Identifier: MIT OR Apache-2.0
//! Guest kernels: Debian's by name, or a tree that the user built.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::cache::{Cache, Item, Made, Wanted};
use super::debian::{self, Extract};
use super::{built, vmlinux};
use crate::event::{Event, EventSink};
use crate::failure::{Failure, Result};

/// A kernel that can be had by name.
#[derive(Clone, Copy, Debug)]
pub struct NamedKernel {
    /// The name.
    pub name: &'static str,
    /// What it is, for people.
    pub about: &'static str,
    origin: Origin,
}

/// Where a kernel comes from.
#[derive(Clone, Copy, Debug)]
enum Origin {
    /// Debian's packages, of a release or of its backports.
    Debian { suite: &'static str, backports: bool },
    /// Compiled here, see [`built`].
    Built(&'static built::Flavour),
}

/// All of them; the first is the default.
pub const KERNELS: &[NamedKernel] = &[
    NamedKernel {
        name: "backports",
        about: "Debian 13 backports: the newest cloud kernel there (7.x); device-private memory",
        origin: Origin::Debian { suite: "trixie", backports: true },
    },
    NamedKernel {
        name: "trixie",
        about: "Debian 13 cloud kernel (6.12); no device-private memory",
        origin: Origin::Debian { suite: "trixie", backports: false },
    },
    NamedKernel {
        name: "bookworm",
        about: "Debian 12 cloud kernel (6.1); no device-private memory",
        origin: Origin::Debian { suite: "bookworm", backports: false },
    },
    NamedKernel { name: built::FAST.name, about: built::FAST.about, origin: Origin::Built(&built::FAST) },
    NamedKernel { name: built::DEBUG.name, about: built::DEBUG.about, origin: Origin::Built(&built::DEBUG) },
    NamedKernel { name: built::HOST.name, about: built::HOST.about, origin: Origin::Built(&built::HOST) },
];

/// Change it when what is fetched, or how it is laid out, changes.
const RECIPE: &str = "cloud image, headers, gcc, make; 1";

/// Image and headers come in one transaction, so that they always fit each other. The small tools are what kbuild calls.
const PACKAGES: &[&str] = &[
    "linux-image-cloud-amd64",
    "linux-headers-cloud-amd64",
    "gcc",
    "make",
    "dash",
    "coreutils",
    "sed",
    "grep",
    "mawk",
    "findutils",
];

/// A kernel to boot and to build modules for.
#[derive(Clone, Debug)]
pub struct Kernel {
    /// The name or path it was asked for by.
    pub name: String,
    /// What `uname -r` says in it.
    pub release: String,
    /// Version of its package, where it has one.
    pub version: Option<String>,
    /// What a machine boots: a bzImage or an ELF vmlinux.
    pub image: PathBuf,
    /// The image as its package or tree has it; the same as `image` unless that was unpacked from it.
    pub packed: PathBuf,
    /// Its ELF file with symbols and line numbers, where there is one.
    pub symbols: Option<PathBuf>,
    /// Its configuration.
    pub config: Option<PathBuf>,
    pub(super) build: Build,
}

/// What its modules are built in.
#[derive(Clone, Debug)]
pub(super) enum Build {
    /// A file system tree with compiler and headers.
    Root { item: Item, headers: String },
    /// A built kernel tree, with the host's compiler.
    Tree(PathBuf),
    /// Nothing: it is only booted.
    Nowhere,
}

impl Kernel {
    /// A kernel of which there is the image only.
    #[must_use]
    pub fn image_only(name: String, release: String, image: PathBuf) -> Self {
        Self {
            name,
            release,
            version: None,
            packed: image.clone(),
            image,
            symbols: None,
            config: None,
            build: Build::Nowhere,
        }
    }

    /// The value of a configuration option (`HMM_MIRROR`, without `CONFIG_`), if it is set.
    #[must_use]
    pub fn option(&self, name: &str) -> Option<String> {
        let text = fs::read_to_string(self.config.as_ref()?).ok()?;
        let prefix = format!("CONFIG_{name}=");
        text.lines()
            .find_map(|line| line.strip_prefix(&prefix))
            .map(|value| value.trim_matches('"').to_owned())
    }

    /// Whether it is one that checks each of its own memory accesses. Where its configuration is not at hand, in an outer guest, its
    /// name tells.
    #[must_use]
    pub fn slow(&self) -> bool {
        self.option("KASAN").is_some() || self.name == built::DEBUG.name
    }

    /// The directory with the modules that came with it, where there is one.
    #[must_use]
    pub fn modules_dir(&self) -> Option<PathBuf> {
        match &self.build {
            Build::Root { item, .. } => {
                let dir = item.path.join("root/usr/lib/modules").join(&self.release);
                dir.is_dir().then_some(dir)
            }
            Build::Tree(_) | Build::Nowhere => None,
        }
    }
}

pub(super) fn provide(cache: &Cache, events: &Arc<dyn EventSink>, name_or_tree: &str) -> Result<Kernel> {
    match named(name_or_tree) {
        None => from_path(name_or_tree),
        Some(named) => match named.origin {
            Origin::Debian { suite, backports } => debian_kernel(cache, events, named, suite, backports),
            Origin::Built(flavour) => from_item(named, built::provide(cache, events, flavour)?),
        },
    }
}

/// Sees whether there can be such a kernel, before anything is fetched or built for it.
pub(super) fn look(name_or_tree: &str) -> Result<()> {
    if named(name_or_tree).is_some() { Ok(()) } else { from_path(name_or_tree).map(drop) }
}

/// Whether that kernel is for the outer guest of nested runs alone: it does not have what a driver under test needs.
pub(crate) fn is_for_outer_guests(name: &str) -> bool {
    name == built::HOST.name
}

/// Refuses a kernel that no guest of a run can have.
pub(crate) fn refuse_outer(name: &str) -> Result<()> {
    if !is_for_outer_guests(name) {
        return Ok(());
    }
    let what =
        format!("--kernel {name}: that kernel has nothing that mirrors memory, it is for outer guests");
    Err(Failure::usage(what).remedy(format!("give --outer-kernel {name} --nested, or another --kernel")))
}

fn named(name: &str) -> Option<&'static NamedKernel> {
    KERNELS.iter().find(|kernel| kernel.name == name)
}

/// The kernel of a tree that the user named, or why that is none.
fn from_path(name_or_tree: &str) -> Result<Kernel> {
    let path = Path::new(name_or_tree);
    let tree = || name_or_tree.to_owned();
    if path.is_dir() {
        return built_tree(tree(), path);
    }
    if path.is_file() {
        check_image(path)?;
        return Err(Failure::usage(format!("{name_or_tree} is a kernel image alone: no modules can be built for it"))
            .remedy("give the directory of the built kernel tree instead; it is found at arch/x86/boot/bzImage or vmlinux"));
    }
    let names: Vec<&str> = KERNELS.iter().map(|kernel| kernel.name).collect();
    Err(Failure::usage(format!("no kernel is named '{name_or_tree}', and no directory is"))
        .remedy(format!("names are {}; a directory must be a built kernel tree", names.join(", "))))
}

/// The kernels that are in the cache, by name, without making any.
pub(crate) fn cached(cache: &Cache) -> Vec<Kernel> {
    KERNELS
        .iter()
        .filter_map(|named| {
            let item = match named.origin {
                Origin::Debian { .. } => cache.get(&item_name(named), RECIPE),
                Origin::Built(flavour) => built::cached(cache, flavour),
            };
            item.and_then(|item| from_item(named, item).ok())
        })
        .collect()
}

fn item_name(named: &NamedKernel) -> String {
    format!("kernel-{}", named.name)
}

fn debian_kernel(
    cache: &Cache,
    events: &Arc<dyn EventSink>,
    named: &NamedKernel,
    suite: &str,
    backports: bool,
) -> Result<Kernel> {
    let item = item_name(named);
    let step = format!("kernel {}", named.name);
    let wanted = Wanted {
        item: &item,
        step: &step,
        about: &format!("fetching the guest kernel '{}' and what its modules are built in", named.name),
        recipe: RECIPE,
        bytes: 700_000_000,
    };
    let item = cache.ensure(&wanted, events, &mut |partial| {
        let what = Extract { suite, backports, packages: PACKAGES, step: &step };
        let packages = debian::extract(cache, events, partial, &what)?;
        let root = partial.path.join("root");
        let (release, image, config) = find_image(&root)?;
        let headers = format!("usr/src/linux-headers-{release}");
        let mut versions = BTreeMap::from([("release".to_owned(), release.clone())]);
        for (package, version) in packages {
            if package.starts_with("linux-image-") || package.starts_with("gcc-1") || package == "make" {
                versions.insert(package, version);
            }
        }
        let mut key_files = vec![format!("root/{image}"), format!("root/{config}")];
        for file in ["Makefile", ".config", "Module.symvers", "include/config/kernel.release"] {
            if root.join(&headers).join(file).exists() {
                key_files.push(format!("root/{headers}/{file}"));
            }
        }
        key_files.extend(tools(cache, &root)?);
        Ok(Made { versions, key_files })
    })?;
    let mut kernel = from_item(named, item)?;
    if let Some(unpacked) = vmlinux::provide(cache, events, named.name, &kernel.packed)? {
        kernel.image = unpacked;
    }
    Ok(kernel)
}

/// The tools in a build root that every build runs, and the libraries they load.
pub(super) fn tools(cache: &Cache, root: &Path) -> Result<Vec<String>> {
    let mut files = Vec::new();
    for dir in ["usr/bin", "usr/lib/x86_64-linux-gnu", "usr/libexec/gcc", "usr/lib/gcc"] {
        if !root.join(dir).is_dir() {
            continue;
        }
        super::cache::walk(&root.join(dir), &mut |file, meta| {
            if meta.is_file() {
                files.push(format!("root/{dir}/{}", file.display()));
            }
        })
        .map_err(|e| cache.trouble("looking through the kernel's packages", &e))?;
    }
    Ok(files)
}

fn from_item(named: &NamedKernel, item: Item) -> Result<Kernel> {
    let root = item.path.join("root");
    let (release, image, config) = find_image(&root)?;
    let image = root.join(image);
    check_image(&image)?;
    let version = item
        .manifest
        .versions
        .iter()
        .find(|(name, _)| name.contains(&release))
        .map(|(_, version)| version.clone());
    let headers = format!("/usr/src/linux-headers-{release}");
    let symbols = root.join("boot").join(format!("{}{release}", built::SYMBOLS));
    Ok(Kernel {
        name: named.name.into(),
        release,
        version,
        packed: image.clone(),
        image,
        symbols: symbols.is_file().then_some(symbols),
        config: Some(root.join(config)),
        build: Build::Root { item, headers },
    })
}

/// Finds release, image and configuration in an unpacked image package. From 7.x on they are beside the modules.
fn find_image(root: &Path) -> Result<(String, String, String)> {
    let names = |dir: &str| -> Vec<String> {
        let entries = fs::read_dir(root.join(dir)).into_iter().flatten().flatten();
        entries.filter_map(|entry| entry.file_name().into_string().ok()).collect()
    };
    for name in names("boot") {
        if let Some(release) = name.strip_prefix("vmlinuz-").or_else(|| name.strip_prefix(built::IMAGE)) {
            return Ok((release.to_owned(), format!("boot/{name}"), format!("boot/config-{release}")));
        }
    }
    for release in names("usr/lib/modules") {
        let dir = format!("usr/lib/modules/{release}");
        if root.join(&dir).join("vmlinuz").is_file() {
            return Ok((release, format!("{dir}/vmlinuz"), format!("{dir}/config")));
        }
    }
    Err(Failure::environment(format!("no kernel image was in the packages unpacked in {}", root.display()))
        .remedy("Debian's kernel packages may have changed their layout; please report it"))
}

/// Makes a cached kernel again if any of its files is not as it was: a compile against a damaged tree fails in ways that look
/// like the driver's fault.
pub(super) fn mend(cache: &Cache, events: &Arc<dyn EventSink>, kernel: &Kernel) -> Result<()> {
    let Build::Root { item, .. } = &kernel.build else { return Ok(()) };
    let Some(damage) = Cache::damage(item) else { return Ok(()) };
    events.event(Event::Note { text: format!("the cached kernel {} is damaged: {damage}", kernel.name) });
    cache.discard(item);
    let again = provide(cache, events, &kernel.name)?;
    if again.release == kernel.release {
        return Ok(());
    }
    Err(Failure::environment(format!(
        "kernel {} is now {} instead of {}",
        kernel.name, again.release, kernel.release
    ))
    .remedy("run it again"))
}

/// A kernel tree that the user built.
fn built_tree(name: String, dir: &Path) -> Result<Kernel> {
    let dir =
        fs::canonicalize(dir).map_err(|e| Failure::usage(format!("cannot use {}: {e}", dir.display())))?;
    let image =
        ["arch/x86/boot/bzImage", "vmlinux"].iter().map(|file| dir.join(file)).find(|file| file.is_file());
    let mut missing = Vec::new();
    if image.is_none() {
        missing.push("arch/x86/boot/bzImage or vmlinux");
    }
    for file in [
        "Makefile",
        "Module.symvers",
        "include/config/kernel.release",
        "include/generated/autoconf.h",
        "scripts/mod/modpost",
    ] {
        if !dir.join(file).is_file() {
            missing.push(file);
        }
    }
    let (Some(image), true) = (image, missing.is_empty()) else {
        return Err(Failure::usage(format!(
            "{} is not a built kernel tree: it lacks {}",
            dir.display(),
            missing.join(", ")
        ))
        .remedy("build it first: make -j$(nproc) bzImage modules   (Module.symvers comes with 'modules')"));
    };
    check_image(&image)?;
    let release = fs::read_to_string(dir.join("include/config/kernel.release"))
        .map_err(|e| Failure::usage(format!("cannot read the release of {}: {e}", dir.display())))?;
    Ok(Kernel {
        name,
        release: release.trim().to_owned(),
        version: None,
        packed: image.clone(),
        image,
        symbols: Some(dir.join("vmlinux")).filter(|file| file.is_file()),
        config: Some(dir.join(".config")).filter(|file| file.is_file()),
        build: Build::Tree(dir),
    })
}

/// Whether a file is an x86-64 Linux image, by its magic: a bzImage's header, or an ELF file for this processor.
fn check_image(image: &Path) -> Result<()> {
    use std::io::Read;
    let mut head = Vec::new();
    fs::File::open(image)
        .and_then(|file| file.take(0x300).read_to_end(&mut head))
        .map_err(|e| Failure::usage(format!("cannot read the kernel {}: {e}", image.display())))?;
    let bzimage = head.get(0x1fe..0x200) == Some(&[0x55, 0xaa]) && head.get(0x202..0x206) == Some(b"HdrS");
    // Class 64, and machine 62: x86-64.
    let elf = head.starts_with(b"\x7fELF\x02") && head.get(18..20) == Some(&[62, 0]);
    if bzimage || elf {
        return Ok(());
    }
    Err(Failure::usage(format!(
        "{} is not an x86-64 Linux kernel: neither a bzImage ('HdrS' at 0x202) nor an ELF file",
        image.display()
    )))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::failure::FailureKind;

    fn ask(what: &Path) -> Failure {
        let cache = Cache::at("/nonexistent").unwrap();
        let events: Arc<dyn EventSink> = Arc::new(|_| {});
        provide(&cache, &events, what.to_str().unwrap()).unwrap_err()
    }

    #[test]
    fn an_unknown_name_lists_the_known() {
        let failure = ask(Path::new("no-such-kernel"));
        assert_eq!(failure.kind, FailureKind::Usage);
        assert!(failure.to_string().contains("backports"), "{failure}");
    }

    #[test]
    fn a_file_that_is_no_kernel() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("bzImage");
        fs::write(&file, [0u8; 4096]).unwrap();
        let failure = ask(&file);
        assert_eq!(failure.kind, FailureKind::Usage);
        assert!(failure.what.contains("not an x86-64 Linux kernel"), "{failure}");
    }

    #[test]
    fn an_image_alone_and_an_unbuilt_tree() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("vmlinux");
        let mut elf = vec![0u8; 64];
        elf[..5].copy_from_slice(b"\x7fELF\x02");
        elf[18] = 62;
        fs::write(&file, elf).unwrap();
        assert!(ask(&file).what.contains("image alone"));
        let failure = ask(dir.path());
        assert_eq!(failure.kind, FailureKind::Usage);
        assert!(failure.what.contains("Module.symvers") && !failure.what.contains("vmlinux"), "{failure}");
    }
}
