// SPDX-License-Identifier: MIT OR Apache-2.0
//! Carries requests out on a function. Knows no socket: a request and its file descriptors go in, a reply comes out.

use std::collections::BTreeMap;
use std::fs::File;
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileExt;
use std::sync::Arc;

use rustix::fs::{SealFlags, fcntl_get_seals, fstat};
use rustix::io::Errno;
use serde_json::{Value, json};
use vfio_bindings::bindings::vfio;
use vgpu::function::{Backing, Function};
use vgpu::memory::SystemMemory;
use zerocopy::{FromBytes, IntoBytes};

use super::interrupts::Interrupts;
use super::wire::{self, DeviceInfo, DmaMap, DmaUnmap, Header, RegionAccess, RegionInfo, Request, Version};

/// Bytes of configuration space.
const CONFIG_BYTES: u64 = 4096;
const CONFIG: u32 = vfio::VFIO_PCI_CONFIG_REGION_INDEX;
const REGIONS: u32 = vfio::VFIO_PCI_NUM_REGIONS;

const DMA_READABLE: u32 = 1;
const DMA_WRITABLE: u32 = 2;
const UNMAP_BITMAP: u32 = 1;
const UNMAP_ALL: u32 = 2;

/// How a region is reached.
enum Region {
    Absent,
    Config,
    Trapped {
        size: u64,
    },
    Mapped {
        size: u64,
        file: File,
    },
    /// The client keeps the interrupt table and its pending bits itself.
    InterruptTable {
        size: u64,
    },
}

impl Region {
    fn size(&self) -> u64 {
        match self {
            Self::Absent => 0,
            Self::Config => CONFIG_BYTES,
            Self::Trapped { size } | Self::Mapped { size, .. } | Self::InterruptTable { size } => *size,
        }
    }
}

/// One client's conversation with one function.
pub struct Session {
    function: Arc<dyn Function>,
    memory: Arc<SystemMemory>,
    interrupts: Arc<Interrupts>,
    regions: Vec<Region>,
    negotiated: bool,
    /// Every region the client has mapped: address to size. Those that came without a file are here only.
    maps: BTreeMap<u64, u64>,
}

impl Session {
    /// A session that has not been negotiated yet.
    ///
    /// # Errors
    /// If a BAR's file cannot be kept open for the client.
    pub fn new(
        function: Arc<dyn Function>,
        memory: Arc<SystemMemory>,
        interrupts: Arc<Interrupts>,
    ) -> std::io::Result<Self> {
        let mut regions: Vec<Region> = (0..REGIONS).map(|_| Region::Absent).collect();
        regions[CONFIG as usize] = Region::Config;
        for bar in function.bars() {
            // The first six regions are the BARs.
            if let Some(region) = regions[..6].get_mut(usize::from(bar.index)) {
                *region = match bar.backing {
                    Backing::Trapped => Region::Trapped { size: bar.size },
                    Backing::Mapped(file) => Region::Mapped { size: bar.size, file: file.try_clone()? },
                    Backing::InterruptTable => Region::InterruptTable { size: bar.size },
                };
            }
        }
        Ok(Self { function, memory, interrupts, regions, negotiated: false, maps: BTreeMap::new() })
    }

    /// Carries one message out. `reply` is emptied and gets the whole reply, or stays empty if none is wanted; the file returned
    /// goes with it.
    pub fn handle(
        &mut self,
        header: Header,
        body: &[u8],
        fds: Vec<OwnedFd>,
        reply: &mut Vec<u8>,
    ) -> Option<&File> {
        reply.clear();
        reply.extend_from_slice(header.as_bytes());
        let outcome =
            wire::parse(header.command.get(), body).and_then(|request| self.carry_out(request, fds, reply));
        if !header.wants_reply() {
            reply.clear();
            return None;
        }
        match outcome {
            Ok(file) => {
                let header = header.reply(reply.len() - Header::BYTES);
                reply[..Header::BYTES].copy_from_slice(header.as_bytes());
                file.and_then(|index| match &self.regions[index] {
                    Region::Mapped { file, .. } => Some(file),
                    _ => None,
                })
            }
            Err(errno) => {
                reply.clear();
                reply.extend_from_slice(header.failure(errno).as_bytes());
                None
            }
        }
    }

    /// Takes back everything the client gave: it is gone.
    pub fn close(&mut self) {
        self.interrupts.clear();
        self.memory.clear();
        self.maps.clear();
        self.negotiated = false;
    }

    /// Appends the reply's body; the region whose file goes with it, if any.
    fn carry_out(
        &mut self,
        request: Request<'_>,
        fds: Vec<OwnedFd>,
        reply: &mut Vec<u8>,
    ) -> Result<Option<usize>, Errno> {
        if let Request::Version { major, minor: _, data } = request {
            self.negotiate(major, data, reply)?;
            return Ok(None);
        }
        if !self.negotiated {
            return Err(Errno::PROTO);
        }
        match request {
            Request::Version { .. } => {}
            Request::DmaMap(map) => self.map(map, fds)?,
            Request::DmaUnmap(unmap) => {
                self.unmap(unmap)?;
                reply.extend_from_slice(unmap.as_bytes());
            }
            Request::DeviceInfo => {
                let flags = vfio::VFIO_DEVICE_FLAGS_RESET | vfio::VFIO_DEVICE_FLAGS_PCI;
                let info = DeviceInfo {
                    argsz: argsz::<DeviceInfo>(),
                    flags: flags.into(),
                    regions: REGIONS.into(),
                    irqs: self.interrupts.kinds().into(),
                };
                reply.extend_from_slice(info.as_bytes());
            }
            Request::RegionInfo(index) => return self.region_info(index, reply),
            Request::IrqInfo(index) => reply.extend_from_slice(self.interrupts.info(index)?.as_bytes()),
            Request::SetIrqs { index, start, count, action } => {
                self.interrupts.set(index, start, count, action, fds)?
            }
            Request::Read(access) => self.read(access, reply)?,
            Request::Write(access, data) => {
                self.write(access.region.get(), access.offset.get(), data)?;
                reply.extend_from_slice(access.as_bytes());
            }
            Request::WriteMulti(writes) => {
                for write in writes {
                    let data = &write.data[..write.count.get() as usize];
                    self.write(write.region.get(), write.offset.get(), data)?;
                }
                reply.extend_from_slice((writes.len() as u64).as_bytes());
            }
            Request::Reset => {
                let effects = self.function.reset();
                self.interrupts.raise_all(effects.interrupts);
            }
        }
        Ok(None)
    }

    fn negotiate(&mut self, major: u16, data: &[u8], reply: &mut Vec<u8>) -> Result<(), Errno> {
        if self.negotiated {
            return Err(Errno::INVAL);
        }
        if major != 0 {
            return Err(Errno::PROTONOSUPPORT);
        }
        let proposed = match data {
            [] => Value::Null,
            _ => serde_json::from_slice(data).map_err(|_| Errno::INVAL)?,
        };
        let mut capabilities = json!({
            "max_msg_fds": wire::MAX_FDS,
            "max_data_xfer_size": wire::MAX_TRANSFER,
            "max_dma_maps": wire::MAX_MAPS,
            "pgsizes": 4096,
        });
        // What the client has not offered may not be in the answer.
        if proposed["capabilities"]["write_multiple"] == Value::Bool(true) {
            capabilities["write_multiple"] = Value::Bool(true);
        }
        reply.extend_from_slice(Version { major: 0.into(), minor: 0.into() }.as_bytes());
        reply.extend_from_slice(json!({ "capabilities": capabilities }).to_string().as_bytes());
        reply.push(0);
        self.negotiated = true;
        Ok(())
    }

    fn map(&mut self, map: &DmaMap, fds: Vec<OwnedFd>) -> Result<(), Errno> {
        let (start, size, flags) = (map.address.get(), map.size.get(), map.flags.get());
        if size == 0 || flags & !(DMA_READABLE | DMA_WRITABLE) != 0 || fds.len() > 1 {
            return Err(Errno::INVAL);
        }
        let end = start.checked_add(size).ok_or(Errno::INVAL)?;
        if self.maps.len() >= wire::MAX_MAPS {
            return Err(Errno::NOSPC);
        }
        if self.maps.range(..end).next_back().is_some_and(|(other, bytes)| other + bytes > start) {
            return Err(Errno::EXIST);
        }
        // Without a file (ROMs, other devices' BARs) the device cannot reach it; such a region is no guest RAM.
        if let Some(fd) = fds.into_iter().next().filter(|_| flags & DMA_READABLE != 0) {
            let file = memory_file(fd, map.offset.get(), size)?;
            self.memory
                .map(start, size, &file, map.offset.get(), flags & DMA_WRITABLE != 0)
                .map_err(|_| Errno::NOMEM)?;
        }
        self.maps.insert(start, size);
        Ok(())
    }

    /// Whole regions only, one or several.
    fn unmap(&mut self, unmap: &DmaUnmap) -> Result<(), Errno> {
        let flags = unmap.flags.get();
        if flags & !(UNMAP_BITMAP | UNMAP_ALL) != 0 {
            return Err(Errno::INVAL);
        }
        if flags & UNMAP_BITMAP != 0 {
            return Err(Errno::OPNOTSUPP);
        }
        let (start, size) = (unmap.address.get(), unmap.size.get());
        if flags & UNMAP_ALL != 0 {
            if (start, size) != (0, 0) {
                return Err(Errno::INVAL);
            }
            self.memory.clear();
            self.maps.clear();
            return Ok(());
        }
        let end = start.checked_add(size).ok_or(Errno::INVAL)?;
        let cut = self.maps.range(..end).next_back().is_some_and(|(other, bytes)| other + bytes > end)
            || self.maps.range(..start).next_back().is_some_and(|(other, bytes)| other + bytes > start);
        if cut {
            return Err(Errno::INVAL);
        }
        let inside: Vec<u64> = self.maps.range(start..end).map(|(other, _)| *other).collect();
        if inside.is_empty() {
            return Err(Errno::NOENT);
        }
        for address in inside {
            self.maps.remove(&address);
        }
        // A range of nothing but regions without a file is not there.
        let _ = self.memory.unmap(start, size);
        Ok(())
    }

    fn region_info(&self, index: u32, reply: &mut Vec<u8>) -> Result<Option<usize>, Errno> {
        let region = self.regions.get(index as usize).ok_or(Errno::INVAL)?;
        let mapped = matches!(region, Region::Mapped { .. });
        let flags = match region {
            Region::Absent => 0,
            _ if mapped => {
                vfio::VFIO_REGION_INFO_FLAG_READ
                    | vfio::VFIO_REGION_INFO_FLAG_WRITE
                    | vfio::VFIO_REGION_INFO_FLAG_MMAP
            }
            _ => vfio::VFIO_REGION_INFO_FLAG_READ | vfio::VFIO_REGION_INFO_FLAG_WRITE,
        };
        let info = RegionInfo {
            argsz: argsz::<RegionInfo>(),
            flags: flags.into(),
            index: index.into(),
            size: region.size().into(),
            ..Default::default()
        };
        reply.extend_from_slice(info.as_bytes());
        Ok(mapped.then_some(index as usize))
    }

    fn read(&self, access: &RegionAccess, reply: &mut Vec<u8>) -> Result<(), Errno> {
        let (index, offset, count) = (access.region.get(), access.offset.get(), access.count.get() as usize);
        let region = self.region(index, offset, count)?;
        reply.extend_from_slice(access.as_bytes());
        let begin = reply.len();
        reply.resize(begin + count, 0);
        let data = &mut reply[begin..];
        match region {
            Region::Absent | Region::InterruptTable { .. } => {}
            Region::Mapped { file, .. } => file.read_exact_at(data, offset).map_err(|_| Errno::IO)?,
            Region::Config => pieces(offset, count, 4, |offset, range| {
                #[allow(clippy::cast_possible_truncation, reason = "below CONFIG_BYTES")]
                self.function.config_read(offset as u16, &mut data[range]);
            }),
            Region::Trapped { .. } => pieces(offset, count, 8, |offset, range| {
                self.function.bar_read(bar(index), offset, &mut data[range]);
            }),
        }
        Ok(())
    }

    fn write(&self, index: u32, offset: u64, data: &[u8]) -> Result<(), Errno> {
        match self.region(index, offset, data.len())? {
            Region::Absent | Region::InterruptTable { .. } => {}
            Region::Mapped { file, .. } => file.write_all_at(data, offset).map_err(|_| Errno::IO)?,
            Region::Config => pieces(offset, data.len(), 4, |offset, range| {
                #[allow(clippy::cast_possible_truncation, reason = "below CONFIG_BYTES")]
                let effects = self.function.config_write(offset as u16, &data[range]);
                self.interrupts.raise_all(effects.interrupts);
            }),
            Region::Trapped { .. } => pieces(offset, data.len(), 8, |offset, range| {
                let effects = self.function.bar_write(bar(index), offset, &data[range]);
                self.interrupts.raise_all(effects.interrupts);
            }),
        }
        Ok(())
    }

    fn region(&self, index: u32, offset: u64, count: usize) -> Result<&Region, Errno> {
        let region = self.regions.get(index as usize).ok_or(Errno::INVAL)?;
        let end = offset.checked_add(count as u64).ok_or(Errno::INVAL)?;
        if end > region.size() { Err(Errno::INVAL) } else { Ok(region) }
    }
}

#[allow(clippy::cast_possible_truncation, reason = "trapped regions are below 6")]
fn bar(index: u32) -> u8 {
    index as u8
}

fn argsz<T>() -> zerocopy::native_endian::U32 {
    u32::try_from(size_of::<T>()).unwrap_or(0).into()
}

/// Cuts an access into naturally aligned pieces of 1, 2, 4 and so on up to `largest` bytes, as a bus would, so that functions see
/// nothing else whatever a client asks for.
fn pieces(offset: u64, count: usize, largest: usize, mut each: impl FnMut(u64, std::ops::Range<usize>)) {
    let mut done = 0;
    while done < count {
        let at = offset + done as u64;
        let aligned =
            if at == 0 { largest } else { 1usize << at.trailing_zeros().min(largest.trailing_zeros()) };
        let left = count - done;
        let size = aligned.min(1 << left.ilog2());
        each(at, done..done + size);
        done += size;
    }
}

/// A file behind guest memory. Touching a mapping beyond the end of its file kills the process, so it must be long enough and
/// sealed against shrinking (QEMU's memfd backend is).
fn memory_file(fd: OwnedFd, offset: u64, size: u64) -> Result<File, Errno> {
    let end = offset.checked_add(size).ok_or(Errno::INVAL)?;
    let seals = fcntl_get_seals(&fd).map_err(|_| Errno::PERM)?;
    if !seals.contains(SealFlags::SHRINK) {
        return Err(Errno::PERM);
    }
    if u64::try_from(fstat(&fd)?.st_size).unwrap_or(0) < end {
        return Err(Errno::INVAL);
    }
    Ok(fd.into())
}

/// Runs a client's byte stream through framing, parser and session without a socket, as the server would, with no file descriptors.
/// Returns how many messages were answered.
///
/// # Panics
/// If a reply is not one that a client can keep in step with: this is the property that fuzzing looks for.
pub fn session_for_fuzzing(session: &mut Session, stream: &[u8]) -> usize {
    let (mut rest, mut reply, mut answered) = (stream, Vec::new(), 0);
    while let Ok((header, after)) = Header::read_from_prefix(rest) {
        let size = header.size.get() as usize;
        if size < Header::BYTES || after.len() < size - Header::BYTES {
            break;
        }
        let (body, after) = after.split_at(size - Header::BYTES);
        rest = after;
        if !header.is_request() || size > wire::MAX_MESSAGE {
            continue;
        }
        session.handle(header, body, Vec::new(), &mut reply);
        if header.wants_reply() {
            let answer = Header::read_from_prefix(&reply).map(|(answer, _)| answer).unwrap_or_default();
            assert!(answer.is_reply() && answer.id == header.id && answer.command == header.command);
            assert_eq!(answer.size.get() as usize, reply.len());
            assert!(reply.len() <= wire::MAX_MESSAGE);
            assert!(answer.failed().is_none_or(|errno| errno != 0 && reply.len() == Header::BYTES));
            answered += 1;
        } else {
            assert!(reply.is_empty());
        }
    }
    answered
}
