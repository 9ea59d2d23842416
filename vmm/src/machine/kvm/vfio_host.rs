// SPDX-License-Identifier: MIT OR Apache-2.0
//! Whether the host can hand a PCI device over, and what to do if it cannot.

use std::fmt;
use std::fs::{self, OpenOptions};
use std::io;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use crate::failure::{Failure, Result};

/// Address of a PCI function: domain, bus, device, function.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Bdf {
    domain: u32,
    bus: u8,
    device: u8,
    function: u8,
}

impl FromStr for Bdf {
    type Err = String;

    fn from_str(text: &str) -> std::result::Result<Self, String> {
        let bad = || format!("{text:?} is no PCI address such as 0000:01:00.0");
        let (rest, function) = text.rsplit_once('.').ok_or_else(bad)?;
        let (rest, device) = rest.rsplit_once(':').ok_or_else(bad)?;
        let (domain, bus) = rest.rsplit_once(':').unwrap_or(("0", rest));
        let number = |text: &str, most: u32| {
            let digits = !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_hexdigit());
            let value = digits.then(|| u32::from_str_radix(text, 16).ok()).flatten();
            value.filter(|value| *value <= most).ok_or_else(bad)
        };
        Ok(Self {
            domain: number(domain, u32::MAX)?,
            bus: number(bus, 0xff)? as u8,
            device: number(device, 31)? as u8,
            function: number(function, 7)? as u8,
        })
    }
}

impl fmt::Display for Bdf {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:04x}:{:02x}:{:02x}.{}", self.domain, self.bus, self.device, self.function)
    }
}

/// How the host's kernel hands devices over.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Way {
    /// Each by itself, its DMA through an address space of `/dev/iommu` (Documentation/userspace-api/iommufd.rst).
    Iommufd,
    /// By IOMMU groups, through a container of `/dev/vfio/vfio` (Documentation/driver-api/vfio.rst).
    Groups,
}

impl fmt::Display for Way {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Iommufd => "iommufd",
            Self::Groups => "its IOMMU group",
        })
    }
}

/// Devices of this host that can be handed over, and how: all of them in one way, since they share the IOMMU's tables.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Handover {
    pub(super) devices: Vec<(Bdf, PathBuf)>,
    pub(super) way: Way,
}

impl Handover {
    /// Sees whether they can be, without taking any.
    ///
    /// # Errors
    /// What is in the way of it, and how to get it out of it.
    pub fn find(devices: &[Bdf]) -> Result<Self> {
        Host::here().handover(devices)
    }

    /// A line for people about each device: how it is handed over.
    pub fn notes(&self) -> impl Iterator<Item = String> {
        self.devices.iter().map(|(bdf, _)| format!("device {bdf} is handed over through {}", self.way))
    }
}

/// Where the host's kernel tells about devices and shows them.
pub(super) struct Host<'a> {
    /// `/sys`.
    pub(super) sys: &'a Path,
    /// `/dev`.
    pub(super) dev: &'a Path,
}

impl Host<'_> {
    /// The one that this program runs on.
    pub(super) fn here() -> Self {
        Self { sys: Path::new("/sys"), dev: Path::new("/dev") }
    }

    /// The devices, if all can be handed over in one way: through iommufd if they can, for that knows no groups.
    fn handover(&self, devices: &[Bdf]) -> Result<Handover> {
        let devices = devices
            .iter()
            .map(|bdf| Ok((*bdf, self.examine(*bdf)?)))
            .collect::<Result<Vec<(Bdf, PathBuf)>>>()?;
        let usable = |nodes: &dyn Fn(Bdf, &Path) -> Result<[Node; 2]>| {
            devices
                .iter()
                .try_for_each(|(bdf, path)| nodes(*bdf, path)?.iter().try_for_each(|node| node.usable(*bdf)))
        };
        // A kernel with groups can be without iommufd, and the other way round; one may be given away and the other not.
        let iommufd_alone = self.dev.join("iommu").exists() && !self.dev.join("vfio/vfio").exists();
        let way = match (usable(&|bdf, path| self.cdev(bdf, path)), iommufd_alone) {
            (Ok(()), _) => Way::Iommufd,
            (Err(failure), true) => return Err(failure),
            (Err(_), false) => {
                usable(&|_, path| Ok(self.group(path)))?;
                Way::Groups
            }
        };
        Ok(Handover { devices, way })
    }

    /// The device's folder, if nothing but the rights to its nodes can be in the way.
    fn examine(&self, bdf: Bdf) -> Result<PathBuf> {
        let fail = |what: String| Failure::environment(format!("--vfio {bdf}: {what}"));
        let path = self.sys.join("bus/pci/devices").join(bdf.to_string());
        if !path.is_dir() {
            return Err(
                fail("the host has no such PCI device".into()).remedy("`lspci -D` lists those that it has")
            );
        }
        if is_bridge(&path) {
            return Err(fail("it is a bridge".into()).remedy("name a device behind it"));
        }
        let no_iommu = |what: &str| {
            fail(what.into()).remedy(
                "turn the IOMMU on in the firmware (VT-d, AMD-Vi), and boot the host with intel_iommu=on \
                 or with amd_iommu=on",
            )
        };
        let group = path.join("iommu_group").canonicalize().map_err(|_| {
            no_iommu("the host has no IOMMU for it (no IOMMU group), so its DMA could reach all memory")
        })?;
        let number = name(&group).filter(|name| name.parse::<u32>().is_ok());
        let number = number.ok_or_else(|| no_iommu("its IOMMU group has no number"))?;
        if fs::read_to_string(group.join("name")).is_ok_and(|name| name.trim() == "vfio-noiommu") {
            return Err(no_iommu("it is bound without an IOMMU, so its DMA could reach all memory"));
        }
        let bind = format!(
            "as root: modprobe vfio-pci; echo vfio-pci > {0}/driver_override; \
             [ ! -e {0}/driver ] || echo {bdf} > {0}/driver/unbind; echo {bdf} > {1}/bus/pci/drivers_probe",
            path.display(),
            self.sys.display()
        );
        match driver(&path) {
            Some(driver) if for_vfio(&driver) => {}
            Some(driver) => {
                let what = format!("it is bound to the driver {driver}, not to vfio-pci");
                return Err(fail(what).remedy(bind));
            }
            None => return Err(fail("it is not bound to vfio-pci (it has no driver)".into()).remedy(bind)),
        }
        let others = self.others(&group, bdf);
        if !others.is_empty() {
            return Err(fail(format!(
                "its IOMMU group {number} is not whole: the host uses {}",
                others.join(", ")
            ))
            .remedy("bind these to vfio-pci too, or to no driver: the IOMMU cannot tell them apart"));
        }
        Ok(path)
    }

    /// What has to be opened to have a device by its group. The path leads to a group: [`Self::examine`] has seen it.
    fn group(&self, device: &Path) -> [Node; 2] {
        let group = device.join("iommu_group").canonicalize().ok().and_then(|group| name(&group));
        [
            Node {
                path: self.dev.join("vfio/vfio"),
                absent: "load the modules vfio and vfio_iommu_type1",
                busy: "end the program that uses it",
            },
            Node {
                path: self.dev.join("vfio").join(group.unwrap_or_default()),
                absent: "see that the device is bound to vfio-pci",
                busy: "end the program that uses the group",
            },
        ]
    }

    /// What has to be opened to have a device through iommufd.
    fn cdev(&self, bdf: Bdf, device: &Path) -> Result<[Node; 2]> {
        let names = fs::read_dir(device.join("vfio-dev")).into_iter().flatten().flatten();
        let name = names.map(|entry| entry.file_name()).next().ok_or_else(|| {
            Failure::environment(format!("--vfio {bdf}: vfio-pci has made no vfio device of it"))
                .remedy("see in the kernel's log why not; a host's kernel before 6.2 hands devices over by groups only")
        })?;
        Ok([
            Node {
                path: self.dev.join("iommu"),
                absent: "load the module iommufd",
                busy: "end the program that uses it",
            },
            Node {
                path: self.dev.join("vfio/devices").join(name),
                absent: "use a host's kernel with CONFIG_VFIO_DEVICE_CDEV, or one with CONFIG_VFIO_GROUP",
                busy: "end the program that uses the device",
            },
        ])
    }

    /// The other devices of a group that the host uses itself, with their drivers.
    fn others(&self, group: &Path, bdf: Bdf) -> Vec<String> {
        let devices = fs::read_dir(group.join("devices")).into_iter().flatten().flatten();
        let mut others: Vec<String> = devices
            .filter_map(|entry| {
                let other = entry.file_name().to_string_lossy().into_owned();
                let path = self.sys.join("bus/pci/devices").join(&other);
                let driver = driver(&path)?;
                let harmless = for_vfio(&driver)
                    || driver == "pci-stub"
                    || driver == "pcieport"
                    || is_bridge(&path)
                    || other == bdf.to_string();
                (!harmless).then(|| format!("{other} (driver {driver})"))
            })
            .collect();
        others.sort();
        others
    }
}

/// A file of the host's that has to be opened.
struct Node {
    path: PathBuf,
    /// What to do if it is not there.
    absent: &'static str,
    /// What to do if it can be opened once only, and is.
    busy: &'static str,
}

impl Node {
    fn usable(&self, bdf: Bdf) -> Result<()> {
        openable(&self.path).map_err(|error| {
            let remedy = match error.kind() {
                io::ErrorKind::PermissionDenied => {
                    format!("give yourself the right: sudo chown \"$USER\" {}", self.path.display())
                }
                io::ErrorKind::ResourceBusy => self.busy.to_owned(),
                _ => self.absent.to_owned(),
            };
            Failure::environment(format!("--vfio {bdf}: {} cannot be opened: {error}", self.path.display()))
                .remedy(remedy)
        })
    }
}

fn openable(node: &Path) -> io::Result<()> {
    OpenOptions::new().read(true).write(true).open(node).map(drop)
}

fn driver(device: &Path) -> Option<String> {
    name(&fs::read_link(device.join("driver")).ok()?)
}

/// Whether that driver hands its devices over.
fn for_vfio(driver: &str) -> bool {
    driver == "vfio-pci" || driver.ends_with("-vfio-pci") || driver.ends_with("_vfio_pci")
}

fn is_bridge(device: &Path) -> bool {
    fs::read_to_string(device.join("class")).is_ok_and(|class| class.starts_with("0x06"))
}

fn name(path: &Path) -> Option<String> {
    Some(path.file_name()?.to_string_lossy().into_owned())
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::{PermissionsExt, symlink};

    use super::*;

    const GPU: &str = "0000:01:00.0";

    /// A host with one device in group 7, bound to vfio-pci.
    struct Fake(tempfile::TempDir);

    impl Fake {
        fn new() -> Self {
            let fake = Self(tempfile::tempdir().unwrap());
            fake.device(GPU, "0x030000", Some("vfio-pci"), Some("7"));
            fs::create_dir_all(fake.path("dev/vfio")).unwrap();
            fs::write(fake.path("dev/vfio/vfio"), "").unwrap();
            fs::write(fake.path("dev/vfio/7"), "").unwrap();
            fake
        }
        fn path(&self, path: &str) -> PathBuf {
            self.0.path().join(path)
        }
        fn device(&self, bdf: &str, class: &str, driver: Option<&str>, group: Option<&str>) {
            let device = self.path("sys/bus/pci/devices").join(bdf);
            fs::create_dir_all(&device).unwrap();
            fs::write(device.join("class"), class).unwrap();
            let _ = fs::remove_file(device.join("driver"));
            if let Some(driver) = driver {
                symlink(format!("../../drivers/{driver}"), device.join("driver")).unwrap();
            }
            let _ = fs::remove_file(device.join("iommu_group"));
            if let Some(group) = group {
                let folder = self.path("sys/kernel/iommu_groups").join(group);
                fs::create_dir_all(folder.join("devices").join(bdf)).unwrap();
                symlink(folder, device.join("iommu_group")).unwrap();
            }
        }
        /// What a host's kernel with iommufd has beside, for the device.
        fn iommufd(&self) {
            fs::create_dir_all(self.path("sys/bus/pci/devices").join(GPU).join("vfio-dev/vfio3")).unwrap();
            fs::create_dir_all(self.path("dev/vfio/devices")).unwrap();
            fs::write(self.path("dev/iommu"), "").unwrap();
            fs::write(self.path("dev/vfio/devices/vfio3"), "").unwrap();
        }
        fn examine(&self, bdf: &str) -> Result<Handover> {
            let (sys, dev) = (self.path("sys"), self.path("dev"));
            Host { sys: &sys, dev: &dev }.handover(&[bdf.parse().unwrap()])
        }
        #[track_caller]
        fn refuses(&self, bdf: &str, what: &str, remedy: &str) {
            let failure = self.examine(bdf).unwrap_err();
            assert_eq!(failure.kind.exit_status(), 4);
            assert!(failure.what.contains(what), "{}", failure.what);
            assert!(failure.remedy.as_ref().unwrap().contains(remedy), "{:?}", failure.remedy);
        }
    }

    #[test]
    fn addresses() {
        for (text, shown) in
            [(GPU, GPU), ("1:0.0", GPU), ("00:1f.7", "0000:00:1f.7"), ("10000:e1:00.0", "10000:e1:00.0")]
        {
            assert_eq!(text.parse::<Bdf>().unwrap().to_string(), shown);
        }
        for bad in [
            "",
            "gpu",
            "00:04",
            "0:20.0",
            "0:0.8",
            "100:0.0",
            "+0:0.0",
            "0000:00:00.0.0",
            "../..:0.0",
            "a:b:c:d.0",
        ] {
            assert!(bad.parse::<Bdf>().is_err(), "{bad}");
        }
    }

    #[test]
    fn what_is_in_the_way_is_named() {
        let fake = Fake::new();
        let found = fake.examine(GPU).unwrap();
        assert!(found.devices[0].1.ends_with(GPU));
        assert_eq!(found.way, Way::Groups);
        fake.refuses("0:2.0", "no such PCI device", "lspci");
        fake.device("0000:00:01.0", "0x060400", Some("pcieport"), Some("7"));
        fake.refuses("0:1.0", "a bridge", "behind it");
        assert!(fake.examine(GPU).is_ok(), "a bridge in the group is no harm");
        fake.device("0000:01:00.1", "0x040300", Some("snd_hda_intel"), Some("7"));
        fake.refuses(GPU, "not whole: the host uses 0000:01:00.1 (driver snd_hda_intel)", "vfio-pci too");
        fake.device("0000:01:00.1", "0x040300", None, Some("7"));
        assert!(fake.examine(GPU).is_ok());
        fake.device(GPU, "0x030000", Some("nouveau"), Some("7"));
        fake.refuses(GPU, "driver nouveau", "driver_override");
        fake.device(GPU, "0x030000", None, Some("7"));
        fake.refuses(GPU, "no driver", "drivers_probe");
        fake.device(GPU, "0x030000", Some("vfio-pci"), None);
        fake.refuses(GPU, "no IOMMU", "intel_iommu=on");
        fake.device(GPU, "0x030000", Some("vfio-pci"), Some("8"));
        fake.refuses(GPU, "vfio/8 cannot be opened", "bound to vfio-pci");
        fs::write(fake.path("sys/kernel/iommu_groups/8/name"), "vfio-noiommu\n").unwrap();
        fake.refuses(GPU, "without an IOMMU", "firmware");
        fs::remove_file(fake.path("dev/vfio/vfio")).unwrap();
        fake.device(GPU, "0x030000", Some("vfio-pci"), Some("7"));
        fake.refuses(GPU, "vfio/vfio cannot be opened", "vfio_iommu_type1");
    }

    #[test]
    fn iommufd_where_the_host_has_it() {
        let fake = Fake::new();
        fake.iommufd();
        let found = fake.examine(GPU).unwrap();
        assert_eq!(found.way, Way::Iommufd);
        assert_eq!(
            found.notes().collect::<Vec<_>>(),
            [format!("device {GPU} is handed over through iommufd")]
        );
        // The group's rules hold all the same: the IOMMU tells its devices no more apart.
        fake.device("0000:01:00.1", "0x040300", Some("snd_hda_intel"), Some("7"));
        fake.refuses(GPU, "not whole", "vfio-pci too");
        fake.device("0000:01:00.1", "0x040300", None, Some("7"));
        // A kernel without groups.
        fs::remove_file(fake.path("dev/vfio/vfio")).unwrap();
        fs::remove_file(fake.path("dev/vfio/7")).unwrap();
        assert_eq!(fake.examine(GPU).unwrap().way, Way::Iommufd);
        fs::remove_file(fake.path("dev/vfio/devices/vfio3")).unwrap();
        fake.refuses(GPU, "devices/vfio3 cannot be opened", "CONFIG_VFIO_DEVICE_CDEV");
        fs::remove_dir(fake.path("sys/bus/pci/devices").join(GPU).join("vfio-dev/vfio3")).unwrap();
        fake.refuses(GPU, "made no vfio device", "before 6.2");
        // A kernel with neither, or with no module loaded.
        fs::remove_file(fake.path("dev/iommu")).unwrap();
        fake.refuses(GPU, "vfio/vfio cannot be opened", "vfio_iommu_type1");
        // And one that has both, of which one can be used.
        fake.iommufd();
        fs::remove_file(fake.path("dev/iommu")).unwrap();
        fs::write(fake.path("dev/vfio/vfio"), "").unwrap();
        fs::write(fake.path("dev/vfio/7"), "").unwrap();
        assert_eq!(fake.examine(GPU).unwrap().way, Way::Groups);
    }

    #[test]
    fn a_group_of_somebody_else() {
        let fake = Fake::new();
        fs::set_permissions(fake.path("dev/vfio/7"), fs::Permissions::from_mode(0o0)).unwrap();
        // The superuser may all the same.
        if openable(&fake.path("dev/vfio/7")).is_err() {
            fake.refuses(GPU, "Permission denied", "chown");
        }
    }
}
