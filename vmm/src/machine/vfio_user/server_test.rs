// SPDX-License-Identifier: MIT OR Apache-2.0
//! The server as a client sees it: over a socket pair, well behaved, clumsy and hostile.

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use parking_lot::Mutex;
use proptest::prelude::*;
use rustix::event::{EventfdFlags, eventfd};
use rustix::fs::{MemfdFlags, SealFlags, fcntl_add_seals, memfd_create};
use rustix::io::Errno;
use vfio_bindings::bindings::vfio;
use vgpu::function::{Backing, Bar, Effects, Function, InterruptSink, InterruptSwitch};
use vgpu::memory::SystemMemory;
use zerocopy::{FromBytes, FromZeros, Immutable, IntoBytes};

use super::interrupts::Interrupts;
use super::server::{Connection, Server};
use super::session::{Session, session_for_fuzzing};
use super::wire::*;
use crate::machine::FunctionSlot;

/// BAR0 keeps what is written; a write to 0x10 raises the vectors written, one to 0x20 the vector through the switch.
struct Toy {
    registers: Mutex<Vec<u8>>,
    accesses: Mutex<Vec<(u64, usize)>>,
    vram: File,
    interrupts: Arc<InterruptSwitch>,
    resets: AtomicU32,
}

const BAR0: u64 = 0x1000;
const VRAM: u64 = 0x4000;

impl Function for Toy {
    fn bars(&self) -> Vec<Bar<'_>> {
        let bar = |index, size, backing| Bar { index, size, prefetchable: false, backing };
        vec![
            bar(0, BAR0, Backing::Trapped),
            bar(2, VRAM, Backing::Mapped(&self.vram)),
            bar(4, 0x1000, Backing::InterruptTable),
        ]
    }
    fn vectors(&self) -> u16 {
        3
    }
    fn has_msix(&self) -> bool {
        true
    }
    fn config_read(&self, offset: u16, data: &mut [u8]) {
        assert!(offset as usize + data.len() <= 4096 && data.len() <= 4);
        data.fill(offset as u8);
    }
    fn config_write(&self, offset: u16, data: &[u8]) -> Effects {
        assert!(offset as usize + data.len() <= 4096 && data.len() <= 4);
        Effects::default()
    }
    fn bar_read(&self, bar: u8, offset: u64, data: &mut [u8]) {
        assert!(bar == 0 && offset % data.len() as u64 == 0 && data.len() <= 8);
        data.copy_from_slice(&self.registers.lock()[offset as usize..][..data.len()]);
    }
    fn bar_write(&self, bar: u8, offset: u64, data: &[u8]) -> Effects {
        assert!(bar == 0 && offset % data.len() as u64 == 0 && data.len() <= 8);
        self.accesses.lock().push((offset, data.len()));
        self.registers.lock()[offset as usize..][..data.len()].copy_from_slice(data);
        if offset == 0x20 {
            self.interrupts.raise(data[0].into());
        }
        Effects { interrupts: if offset == 0x10 { data[0].into() } else { 0 } }
    }
    fn reset(&self) -> Effects {
        self.resets.fetch_add(1, Ordering::SeqCst);
        Effects::default()
    }
}

fn memfd(bytes: u64) -> File {
    let file: File = memfd_create("test", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING).unwrap().into();
    file.set_len(bytes).unwrap();
    file
}

fn ram(bytes: u64) -> File {
    let file = memfd(bytes);
    fcntl_add_seals(&file, SealFlags::SHRINK).unwrap();
    file
}

struct Client {
    stream: UnixStream,
    server: Server,
    toy: Arc<Toy>,
    memory: Arc<SystemMemory>,
    id: u16,
}

fn toy() -> (Arc<Toy>, Arc<SystemMemory>) {
    let toy = Toy {
        registers: Mutex::new(vec![0; BAR0 as usize]),
        accesses: Mutex::default(),
        vram: memfd(VRAM),
        interrupts: Arc::new(InterruptSwitch::new()),
        resets: AtomicU32::new(0),
    };
    (Arc::new(toy), Arc::new(SystemMemory::new()))
}

impl Client {
    /// Connected, but not negotiated.
    fn strange() -> Self {
        let (toy, memory) = toy();
        let (stream, theirs) = UnixStream::pair().unwrap();
        stream.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
        let interrupts = toy.interrupts.clone();
        let slot = FunctionSlot { name: "toy", function: toy.clone(), memory: memory.clone(), interrupts };
        let server = Server::start(slot, Connection::Stream(theirs)).unwrap();
        Self { stream, server, toy, memory, id: 0 }
    }

    fn new() -> Self {
        let mut client = Self::strange();
        client
            .call(command::VERSION, b"\0\0\x01\0{\"capabilities\":{\"write_multiple\":true}}\0", &[])
            .unwrap();
        client
    }

    fn send(&mut self, header: Header, body: &[u8], fds: &[OwnedFd]) {
        let message = [header.as_bytes(), body].concat();
        let fds: Vec<_> = fds.iter().map(std::os::fd::AsFd::as_fd).collect();
        let mut space = vec![std::mem::MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(64))];
        let mut control = rustix::net::SendAncillaryBuffer::new(&mut space);
        if !fds.is_empty() {
            assert!(control.push(rustix::net::SendAncillaryMessage::ScmRights(&fds)));
        }
        let slices = [std::io::IoSlice::new(&message)];
        let flags = rustix::net::SendFlags::empty();
        assert_eq!(rustix::net::sendmsg(&self.stream, &slices, &mut control, flags).unwrap(), message.len());
    }

    fn receive(&mut self, id: u16) -> Result<Vec<u8>, Errno> {
        let mut header = Header::new_zeroed();
        self.stream.read_exact(header.as_mut_bytes()).unwrap();
        let mut body = vec![0; header.size.get() as usize - Header::BYTES];
        self.stream.read_exact(&mut body).unwrap();
        assert!(header.is_reply());
        assert_eq!(header.id.get(), id, "out of step");
        match header.failed() {
            Some(errno) => {
                assert!(body.is_empty() && errno != 0);
                Err(Errno::from_raw_os_error(errno as i32))
            }
            None => Ok(body),
        }
    }

    fn call(&mut self, command: u16, body: &[u8], fds: &[OwnedFd]) -> Result<Vec<u8>, Errno> {
        self.id += 1;
        self.send(Header::request(self.id, command, body.len()), body, fds);
        self.receive(self.id)
    }

    fn write(&mut self, region: u32, offset: u64, data: &[u8]) -> Result<(), Errno> {
        let access = access(region, offset, data.len() as u32);
        self.call(command::REGION_WRITE, &[access.as_bytes(), data].concat(), &[]).map(drop)
    }

    fn read(&mut self, region: u32, offset: u64, count: u32) -> Result<Vec<u8>, Errno> {
        let reply = self.call(command::REGION_READ, access(region, offset, count).as_bytes(), &[])?;
        Ok(reply[size_of::<RegionAccess>()..].to_vec())
    }

    fn map(&mut self, address: u64, size: u64, flags: u32, fds: &[OwnedFd]) -> Result<(), Errno> {
        let map =
            DmaMap { flags: flags.into(), address: address.into(), size: size.into(), ..Default::default() };
        self.call(command::DMA_MAP, map.as_bytes(), fds).map(drop)
    }

    fn unmap(&mut self, address: u64, size: u64, flags: u32) -> Result<(), Errno> {
        let unmap = DmaUnmap {
            flags: flags.into(),
            address: address.into(),
            size: size.into(),
            ..Default::default()
        };
        self.call(command::DMA_UNMAP, unmap.as_bytes(), &[]).map(drop)
    }

    fn reaches(&self, address: u64) -> bool {
        self.memory.snapshot().read(address, &mut [0; 8]).is_ok()
    }
}

fn access(region: u32, offset: u64, count: u32) -> RegionAccess {
    RegionAccess { offset: offset.into(), region: region.into(), count: count.into() }
}

fn info<T: FromBytes + Immutable>(reply: &[u8]) -> T {
    T::read_from_bytes(reply).unwrap()
}

#[test]
fn negotiation_comes_first_and_once() {
    let mut client = Client::strange();
    assert_eq!(client.read(0, 0, 4), Err(Errno::PROTO));
    assert_eq!(client.call(command::VERSION, &[], &[]), Err(Errno::INVAL));
    assert_eq!(client.call(command::VERSION, b"\0\0\0\0{}", &[]), Err(Errno::INVAL));
    assert_eq!(client.call(command::VERSION, b"\0\0\0\0{\0", &[]), Err(Errno::INVAL));
    assert_eq!(client.call(command::VERSION, b"\x01\0\0\0{}\0", &[]), Err(Errno::PROTONOSUPPORT));
    let deep = [b"\0\0\0\0".as_slice(), &[b'['; 50_000], b"\0"].concat();
    assert_eq!(client.call(command::VERSION, &deep, &[]), Err(Errno::INVAL));
    let reply = client.call(command::VERSION, b"\0\0\x01\0", &[]).unwrap();
    let json: serde_json::Value = serde_json::from_slice(&reply[4..reply.len() - 1]).unwrap();
    assert_eq!((&reply[..4], reply.last()), ([0; 4].as_slice(), Some(&0)));
    assert_eq!(json["capabilities"]["max_msg_fds"], 16);
    assert!(json["capabilities"].get("write_multiple").is_none(), "was not offered");
    assert_eq!(client.call(command::VERSION, b"\0\0\0\0", &[]), Err(Errno::INVAL));
}

#[test]
fn describes_the_device() {
    let mut client = Client::new();
    let body = DeviceInfo { argsz: 16.into(), ..Default::default() };
    let device: DeviceInfo = info(&client.call(command::DEVICE_GET_INFO, body.as_bytes(), &[]).unwrap());
    assert_eq!((device.flags.get(), device.regions.get(), device.irqs.get()), (3, 9, 5));
    let sizes: Vec<_> = (0..9u32)
        .map(|index| {
            let body = RegionInfo { argsz: 32.into(), index: index.into(), ..Default::default() };
            let reply = client.call(command::DEVICE_GET_REGION_INFO, body.as_bytes(), &[]).unwrap();
            let region: RegionInfo = info(&reply);
            (region.size.get(), region.flags.get())
        })
        .collect();
    assert_eq!(sizes[0], (BAR0, 3));
    assert_eq!(sizes[2], (VRAM, 7));
    assert_eq!(sizes[4], (0x1000, 3));
    assert_eq!(sizes[7], (4096, 3));
    for absent in [1, 3, 5, 6, 8] {
        assert_eq!(sizes[absent], (0, 0));
    }
    let counts = [0, 4, 3, 1, 1];
    for (index, expected) in (0u32..).zip(counts) {
        let body = IrqInfo { argsz: 16.into(), index: index.into(), ..Default::default() };
        let irq: IrqInfo = info(&client.call(command::DEVICE_GET_IRQ_INFO, body.as_bytes(), &[]).unwrap());
        assert_eq!(irq.count.get(), expected);
    }
    let short = IrqInfo { argsz: 15.into(), ..Default::default() };
    assert_eq!(client.call(command::DEVICE_GET_IRQ_INFO, short.as_bytes(), &[]), Err(Errno::INVAL));
}

#[test]
fn accesses_are_cut_as_on_a_bus() {
    let mut client = Client::new();
    client.write(0, 0x41, &[1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16]).unwrap();
    assert_eq!(*client.toy.accesses.lock(), [(0x41, 1), (0x42, 2), (0x44, 4), (0x48, 8), (0x50, 1)]);
    assert_eq!(client.read(0, 0x43, 5).unwrap(), [3, 4, 5, 6, 7]);
    assert_eq!(client.read(7, 0xffe, 2).unwrap(), [0xfe; 2]);
    assert_eq!(client.read(7, 0, 4096).unwrap().len(), 4096);
    assert_eq!(client.read(7, 0xffe, 3), Err(Errno::INVAL));
    assert_eq!(client.read(0, u64::MAX, 4), Err(Errno::INVAL));
    assert_eq!(client.write(1, 0, &[0]), Err(Errno::INVAL));
    assert_eq!(client.write(u32::MAX, 0, &[0]), Err(Errno::INVAL));
    assert_eq!(client.read(0, 0, u32::MAX), Err(Errno::TOOBIG));
    // A mapped region can be reached by messages as well.
    client.write(2, VRAM - 4, b"vram").unwrap();
    let mut bytes = [0; 4];
    client.toy.vram.read_exact_at(&mut bytes, VRAM - 4).unwrap();
    assert_eq!((&bytes, client.read(2, VRAM - 4, 4).unwrap().as_slice()), (b"vram", b"vram".as_slice()));
}

#[test]
fn several_writes_in_one_message_keep_their_order() {
    let mut client = Client::new();
    let write = |offset: u64, data: &[u8]| {
        let mut write =
            SmallWrite { offset: offset.into(), count: (data.len() as u32).into(), ..Default::default() };
        write.data[..data.len()].copy_from_slice(data);
        write
    };
    let writes = [write(0x80, &[1, 2, 3, 4]), write(0x80, &[5, 6])];
    let body = [2u64.as_bytes(), writes.as_bytes()].concat();
    assert_eq!(client.call(command::REGION_WRITE_MULTI, &body, &[]).unwrap(), 2u64.to_ne_bytes());
    assert_eq!(client.read(0, 0x80, 4).unwrap(), [5, 6, 3, 4]);
}

#[test]
fn interrupts_reach_the_client() {
    let mut client = Client::new();
    let events: Vec<_> = (0..3).map(|_| eventfd(0, EventfdFlags::NONBLOCK).unwrap()).collect();
    let set = IrqSet {
        argsz: 20.into(),
        flags: (vfio::VFIO_IRQ_SET_DATA_EVENTFD | vfio::VFIO_IRQ_SET_ACTION_TRIGGER).into(),
        index: vfio::VFIO_PCI_MSIX_IRQ_INDEX.into(),
        start: 0.into(),
        count: 3.into(),
    };
    client.call(command::DEVICE_SET_IRQS, set.as_bytes(), &events).unwrap();
    client.write(0, 0x10, &[0b101]).unwrap();
    client.write(0, 0x20, &[1]).unwrap();
    for event in &events {
        let mut count = [0; 8];
        rustix::io::read(event, &mut count).unwrap();
        assert_eq!(u64::from_ne_bytes(count), 1);
    }
}

#[test]
fn memory_is_mapped_and_taken_back() {
    let mut client = Client::new();
    let file = ram(0x4000);
    client.map(0x10000, 0x4000, 3, &[file.try_clone().unwrap().into()]).unwrap();
    client.memory.snapshot().write(0x10008, b"written").unwrap();
    let mut bytes = [0; 7];
    file.read_exact_at(&mut bytes, 8).unwrap();
    assert_eq!(&bytes, b"written");
    let again = [ram(0x4000).into()];
    assert_eq!(client.map(0x13000, 0x1000, 3, &again), Err(Errno::EXIST));
    assert_eq!(client.map(0xf000, 0x2000, 3, &again), Err(Errno::EXIST));
    // Read-only, and without a file.
    client.map(0x20000, 0x1000, 1, &again).unwrap();
    assert!(client.reaches(0x20000) && client.memory.snapshot().write(0x20000, &[1]).is_err());
    client.map(0x30000, 0x1000, 3, &[]).unwrap();
    assert!(!client.reaches(0x30000));
    assert_eq!(client.map(0x30000, 0x1000, 3, &[]), Err(Errno::EXIST));
    assert_eq!(client.unmap(0x10000, 0x1000, 0), Err(Errno::INVAL));
    assert_eq!(client.unmap(0x12000, 0x4000, 0), Err(Errno::INVAL));
    assert_eq!(client.unmap(0x50000, 0x1000, 0), Err(Errno::NOENT));
    assert_eq!(client.unmap(0x30000, 0x1000, 1), Err(Errno::OPNOTSUPP));
    client.unmap(0x30000, 0x1000, 0).unwrap();
    client.unmap(0x10000, 0x4000, 0).unwrap();
    assert!(!client.reaches(0x10000) && client.reaches(0x20000));
    client.unmap(0, 0, 2).unwrap();
    assert!(!client.reaches(0x20000));
}

#[test]
fn memory_that_could_kill_us_is_refused() {
    let mut client = Client::new();
    assert_eq!(client.map(0, 0x1000, 3, &[memfd(0x1000).into()]), Err(Errno::PERM), "may shrink");
    assert_eq!(client.map(0, 0x2000, 3, &[ram(0x1000).into()]), Err(Errno::INVAL), "too short");
    assert_eq!(client.map(0, 0x1000, 3, &[File::open("/dev/zero").unwrap().into()]), Err(Errno::PERM));
    assert_eq!(client.map(u64::MAX - 0xfff, 0x2000, 3, &[ram(0x2000).into()]), Err(Errno::INVAL), "wraps");
    assert_eq!(client.map(0, 0, 3, &[ram(0x1000).into()]), Err(Errno::INVAL));
    assert_eq!(client.map(0, 0x1000, 3, &[ram(0x1000).into(), ram(0x1000).into()]), Err(Errno::INVAL));
    client.map(0, 0x1000, 3, &[ram(0x1000).into()]).unwrap();
}

#[test]
fn the_end_of_the_connection_takes_everything_back() {
    let mut client = Client::new();
    client.map(0, 0x1000, 3, &[ram(0x1000).into()]).unwrap();
    let Client { stream, mut server, memory, .. } = client;
    drop(stream);
    server.join().unwrap();
    assert!(memory.snapshot().read(0, &mut [0]).is_err());
}

#[test]
fn stops_wherever_it_is_blocked() {
    let mut client = Client::new();
    client.stream.write_all(&[0; 5]).unwrap();
    client.server.stop().unwrap();
    assert_eq!(client.stream.read(&mut [0]).unwrap(), 0);

    let (toy, memory) = toy();
    let folder = tempfile::tempdir().unwrap();
    let listener = std::os::unix::net::UnixListener::bind(folder.path().join("socket")).unwrap();
    let interrupts = toy.interrupts.clone();
    let slot = FunctionSlot { name: "toy", function: toy, memory, interrupts };
    Server::start(slot, Connection::Listener(listener)).unwrap().stop().unwrap();
}

#[test]
fn unwanted_replies_are_not_sent() {
    let mut client = Client::new();
    let body = [access(0, 0, 1).as_bytes(), &[7]].concat();
    client.send(Header::request(98, command::REGION_WRITE, body.len()).without_reply(), &body, &[]);
    client.send(Header::request(99, 4711, 0).without_reply(), &[], &[]);
    client.send(Header::request(99, command::REGION_READ, 0).reply(0), &[], &[]);
    assert_eq!(client.read(0, 0, 1).unwrap(), [7]);
}

#[test]
fn resets() {
    let mut client = Client::new();
    client.call(command::DEVICE_RESET, &[], &[]).unwrap();
    assert_eq!(client.toy.resets.load(Ordering::SeqCst), 1);
}

#[test]
fn stays_in_step_after_errors_splits_and_excess() {
    let mut client = Client::new();
    // An error with a body.
    assert_eq!(client.call(4711, &[0; 100], &[]), Err(Errno::OPNOTSUPP));
    // Too long, but believable.
    let long = vec![0; MAX_MESSAGE + 1];
    client.stream.write_all(Header::request(500, command::REGION_WRITE, long.len()).as_bytes()).unwrap();
    client.stream.write_all(&long).unwrap();
    assert_eq!(client.receive(500), Err(Errno::MSGSIZE));
    // More descriptors than negotiated; they must not pile up.
    let before = std::fs::read_dir("/proc/self/fd").unwrap().count();
    for _ in 0..50 {
        let events: Vec<_> = (0..40).map(|_| eventfd(0, EventfdFlags::empty()).unwrap()).collect();
        assert_eq!(client.call(command::DEVICE_RESET, &[], &events), Err(Errno::TOOBIG));
    }
    assert!(std::fs::read_dir("/proc/self/fd").unwrap().count() < before + 200);
    // A message in pieces.
    let body = [access(0, 4, 1).as_bytes(), &[42]].concat();
    let message =
        [Header::request(501, command::REGION_WRITE, body.len()).as_bytes(), body.as_slice()].concat();
    for piece in message.chunks(3) {
        client.stream.write_all(piece).unwrap();
        std::thread::sleep(Duration::from_millis(2));
    }
    client.receive(501).unwrap();
    assert_eq!(client.read(0, 4, 1).unwrap(), [42]);
}

#[test]
fn a_length_that_cannot_be_believed_ends_the_connection() {
    let mut client = Client::new();
    let mut header = Header::request(1, command::DEVICE_RESET, 0);
    header.size = 15.into();
    client.send(header, &[], &[]);
    assert_eq!(client.stream.read(&mut [0]).unwrap(), 0);
    assert!(client.server.join().is_err());
}

fn session() -> Session {
    let (toy, memory) = toy();
    Session::new(toy, memory, Interrupts::new(3, true)).unwrap()
}

/// Messages with a right shape and any values, some of them with a wrong shape.
fn message() -> impl Strategy<Value = Vec<u8>> {
    let small = prop_oneof![0u64..0x5000, any::<u64>(), Just(0x1000), Just(u64::MAX)];
    let number = prop_oneof![0u32..16, any::<u32>()];
    let body = prop_oneof![
        4 => (small.clone(), number.clone(), 0usize..40).prop_map(|(offset, region, count)| {
            [access(region % 10, offset, count as u32).as_bytes(), &vec![1; count]].concat()
        }),
        2 => (number.clone(), number.clone(), number.clone(), number.clone()).prop_map(|(flags, index, start, count)| {
            let (flags, index) = (flags.into(), index.into());
            let set = IrqSet { argsz: 20.into(), flags, index, start: start.into(), count: count.into() };
            [set.as_bytes(), &[1; 8]].concat()
        }),
        2 => (number, small.clone(), small.clone()).prop_map(|(flags, address, size)| {
            let map = DmaMap { flags: flags.into(), address: address.into(), size: size.into(), ..Default::default() };
            map.as_bytes().to_vec()
        }),
        2 => (0u64..4, small.clone(), 0u32..10).prop_map(|(count, offset, bytes)| {
            let write = SmallWrite { offset: offset.into(), count: bytes.into(), ..Default::default() };
            [count.as_bytes(), [write; 3].as_bytes()].concat()
        }),
        1 => prop::collection::vec(any::<u8>(), 0..64),
    ];
    (0u16..17, body, any::<u16>(), 0u8..8, 0usize..8).prop_map(|(command, mut body, id, quiet, cut)| {
        if cut == 0 {
            body.truncate(body.len() / 2);
        }
        let header = Header::request(id, command, body.len());
        let header = if quiet == 0 { header.without_reply() } else { header };
        [header.as_bytes(), &body].concat()
    })
}

proptest! {
    #[test]
    fn any_messages_are_answered_in_step(messages in prop::collection::vec(message(), 0..60)) {
        let mut session = session();
        session_for_fuzzing(&mut session, &[Header::request(0, command::VERSION, 4).as_bytes(), &[0; 4]].concat());
        let wanted = messages.iter().filter(|m| Header::read_from_prefix(m).unwrap().0.wants_reply()).count();
        prop_assert_eq!(session_for_fuzzing(&mut session, &messages.concat()), wanted);
    }

    #[test]
    fn any_bytes_are_survived(bytes in prop::collection::vec(any::<u8>(), 0..400)) {
        session_for_fuzzing(&mut session(), &bytes);
    }

    #[test]
    fn any_bytes_on_the_socket_end_in_an_answer_or_the_end(bytes in prop::collection::vec(any::<u8>(), 0..400)) {
        let mut client = Client::new();
        // The server may hang up in the middle.
        let _ = client.stream.write_all(&bytes);
        let _ = client.stream.shutdown(std::net::Shutdown::Write);
        let mut answers = Vec::new();
        let _ = client.stream.read_to_end(&mut answers);
        let _ = client.server.join();
        let mut rest = answers.as_slice();
        while let Ok((header, after)) = Header::read_from_prefix(rest) {
            prop_assert!(header.is_reply());
            rest = &after[header.size.get() as usize - Header::BYTES..];
        }
        prop_assert!(rest.is_empty());
    }
}
