// SPDX-License-Identifier: MIT OR Apache-2.0
//! The messages: bytes to requests, and the layouts of the replies. Pure: nothing here has a side effect.

use rustix::io::Errno;
use vfio_bindings::bindings::vfio;
use zerocopy::native_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

/// Most bytes a client may move with one read or write of a region; told to it at negotiation.
pub const MAX_TRANSFER: usize = 64 << 10;
/// Most bytes a message may have. The largest is a region write of [`MAX_TRANSFER`] bytes.
pub const MAX_MESSAGE: usize = Header::BYTES + size_of::<RegionAccess>() + MAX_TRANSFER;
/// Most file descriptors that come with one message; told to the client at negotiation.
pub const MAX_FDS: usize = 16;
/// Most memory regions a client may have mapped at once; told to it at negotiation.
pub const MAX_MAPS: usize = 4096;
/// Most writes in one [`Request::WriteMulti`].
pub const MAX_WRITES: usize = 1024;

/// Commands that a client may send.
pub mod command {
    #![allow(missing_docs, reason = "the protocol's own names")]
    pub const VERSION: u16 = 1;
    pub const DMA_MAP: u16 = 2;
    pub const DMA_UNMAP: u16 = 3;
    pub const DEVICE_GET_INFO: u16 = 4;
    pub const DEVICE_GET_REGION_INFO: u16 = 5;
    pub const DEVICE_GET_IRQ_INFO: u16 = 7;
    pub const DEVICE_SET_IRQS: u16 = 8;
    pub const REGION_READ: u16 = 9;
    pub const REGION_WRITE: u16 = 10;
    pub const DEVICE_RESET: u16 = 13;
    pub const REGION_WRITE_MULTI: u16 = 15;
}

const TYPE_MASK: u32 = 0xf;
const TYPE_REQUEST: u32 = 0;
const TYPE_REPLY: u32 = 1;
const NO_REPLY: u32 = 1 << 4;
const ERROR: u32 = 1 << 5;

/// What every message begins with.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned,
)]
#[repr(C)]
pub struct Header {
    /// The sender's own; the reply repeats it.
    pub id: U16,
    /// See [`command`].
    pub command: U16,
    /// The whole message, this header included.
    pub size: U32,
    /// Type, whether no reply is wanted, whether it failed.
    pub flags: U32,
    /// In a failed reply, an error number.
    pub error: U32,
}

impl Header {
    /// Its size.
    pub const BYTES: usize = size_of::<Self>();

    /// A request.
    #[must_use]
    pub fn request(id: u16, command: u16, body: usize) -> Self {
        Self {
            id: U16::new(id),
            command: U16::new(command),
            size: U32::new(u32::try_from(Self::BYTES + body).unwrap_or(u32::MAX)),
            flags: U32::new(TYPE_REQUEST),
            error: U32::ZERO,
        }
    }

    /// The same request, wanting no reply.
    #[must_use]
    pub fn without_reply(mut self) -> Self {
        self.flags = U32::new(self.flags.get() | NO_REPLY);
        self
    }

    /// Whether this is a request; what else there is (replies to requests that this server never sends) is skipped.
    #[must_use]
    pub fn is_request(&self) -> bool {
        self.flags.get() & TYPE_MASK == TYPE_REQUEST
    }

    /// Whether this is a reply.
    #[must_use]
    pub fn is_reply(&self) -> bool {
        self.flags.get() & TYPE_MASK == TYPE_REPLY
    }

    /// Whether the sender waits for a reply.
    #[must_use]
    pub fn wants_reply(&self) -> bool {
        self.flags.get() & NO_REPLY == 0
    }

    /// The header of the reply with `body` bytes.
    #[must_use]
    pub fn reply(&self, body: usize) -> Self {
        Self { flags: U32::new(TYPE_REPLY), ..Self::request(self.id.get(), self.command.get(), body) }
    }

    /// The reply that says what went wrong.
    #[must_use]
    pub fn failure(&self, errno: Errno) -> Self {
        let error = u32::try_from(errno.raw_os_error()).unwrap_or_default();
        Self { flags: U32::new(TYPE_REPLY | ERROR), error: U32::new(error), ..self.reply(0) }
    }

    /// The error number of a failed reply.
    #[must_use]
    pub fn failed(&self) -> Option<u32> {
        (self.flags.get() & ERROR != 0).then(|| self.error.get())
    }
}

macro_rules! layout {
    ($(#[$about:meta])* $name:ident { $($(#[$field_about:meta])* $field:ident: $type:ty,)* }) => {
        $(#[$about])*
        #[derive(Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
        #[repr(C)]
        pub struct $name {
            $($(#[$field_about])* pub $field: $type,)*
        }
    };
}

layout!(
    /// Begins a version message; JSON follows.
    Version {
        /// Of the protocol.
        major: U16,
        /// Of the protocol.
        minor: U16,
    }
);
layout!(
    /// A region of guest memory that the device may reach.
    DmaMap {
        /// Of this structure.
        argsz: U32,
        /// Bit 0 readable, bit 1 writable.
        flags: U32,
        /// Into the file that comes with it.
        offset: U64,
        /// As the device sees it.
        address: U64,
        /// In bytes.
        size: U64,
    }
);
layout!(
    /// A region that the device may reach no longer.
    DmaUnmap {
        /// Room for the reply.
        argsz: U32,
        /// Bit 0 asks for a dirty bitmap, bit 1 means all regions.
        flags: U32,
        /// As the device sees it.
        address: U64,
        /// In bytes.
        size: U64,
    }
);
layout!(
    /// What the device has.
    DeviceInfo {
        /// Of this structure.
        argsz: U32,
        /// `VFIO_DEVICE_FLAGS_*`.
        flags: U32,
        /// Regions.
        regions: U32,
        /// Kinds of interrupt.
        irqs: U32,
    }
);
layout!(
    /// `vfio_region_info`.
    RegionInfo {
        /// Of this structure.
        argsz: U32,
        /// `VFIO_REGION_INFO_FLAG_*`.
        flags: U32,
        /// Which region.
        index: U32,
        /// Of the first capability; none are given.
        cap_offset: U32,
        /// In bytes.
        size: U64,
        /// Into the file that comes with it.
        offset: U64,
    }
);
layout!(
    /// `vfio_irq_info`.
    IrqInfo {
        /// Of this structure.
        argsz: U32,
        /// `VFIO_IRQ_INFO_*`.
        flags: U32,
        /// Which kind.
        index: U32,
        /// How many.
        count: U32,
    }
);
layout!(
    /// `vfio_irq_set` without its data.
    IrqSet {
        /// Of this structure and its data.
        argsz: U32,
        /// `VFIO_IRQ_SET_*`.
        flags: U32,
        /// Which kind.
        index: U32,
        /// The first.
        start: U32,
        /// How many.
        count: U32,
    }
);
layout!(
    /// Begins a region read or write and its reply.
    RegionAccess {
        /// Into the region.
        offset: U64,
        /// Which.
        region: U32,
        /// Bytes.
        count: U32,
    }
);
layout!(
    /// One of several small writes in one message.
    SmallWrite {
        /// Into the region.
        offset: U64,
        /// Which.
        region: U32,
        /// Bytes, at most 8.
        count: U32,
        /// The bytes, the first `count` of them.
        data: [u8; 8],
    }
);

// The layouts are the kernel's; its bindings have no zerocopy traits.
const _: () = {
    assert!(Header::BYTES == 16);
    assert!(size_of::<RegionInfo>() == size_of::<vfio::vfio_region_info>());
    assert!(size_of::<IrqInfo>() == size_of::<vfio::vfio_irq_info>());
    assert!(size_of::<IrqSet>() == size_of::<vfio::vfio_irq_set>());
};

/// What to do with interrupts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum IrqAction<'a> {
    /// Signal these file descriptors, or none any more if none came.
    Eventfds,
    /// Disable the whole kind (count 0), or trigger each.
    Trigger,
    /// Trigger where the byte is not zero.
    TriggerIf(&'a [u8]),
}

/// A request whose shape is right. Its values are as the client sent them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Request<'a> {
    /// Negotiation.
    Version {
        /// Proposed.
        major: u16,
        /// Proposed.
        minor: u16,
        /// JSON, without its terminator; empty if there was none.
        data: &'a [u8],
    },
    /// Maps guest memory.
    DmaMap(&'a DmaMap),
    /// Unmaps guest memory.
    DmaUnmap(&'a DmaUnmap),
    /// Asks for [`DeviceInfo`].
    DeviceInfo,
    /// Asks for [`RegionInfo`] of the region.
    RegionInfo(u32),
    /// Asks for [`IrqInfo`] of the kind.
    IrqInfo(u32),
    /// Sets up interrupts.
    SetIrqs {
        /// Kind.
        index: u32,
        /// First.
        start: u32,
        /// How many.
        count: u32,
        /// What.
        action: IrqAction<'a>,
    },
    /// Reads a region; `count` is at most [`MAX_TRANSFER`].
    Read(&'a RegionAccess),
    /// Writes a region.
    Write(&'a RegionAccess, &'a [u8]),
    /// Several small writes, each of at most 8 bytes.
    WriteMulti(&'a [SmallWrite]),
    /// Resets the device.
    Reset,
}

/// Turns a request's body into a request.
///
/// # Errors
/// The error number to answer with: `EOPNOTSUPP` for commands that this server does not carry out, `EINVAL` for a body that does
/// not fit its command, `E2BIG` for more than was negotiated.
pub fn parse(command: u16, body: &[u8]) -> Result<Request<'_>, Errno> {
    match command {
        command::VERSION => {
            let (version, data) = split::<Version>(body)?;
            let data = match data {
                [] => data,
                [data @ .., 0] => data,
                _ => return Err(Errno::INVAL),
            };
            Ok(Request::Version { major: version.major.get(), minor: version.minor.get(), data })
        }
        command::DMA_MAP => Ok(Request::DmaMap(split(body)?.0)),
        command::DMA_UNMAP => Ok(Request::DmaUnmap(split(body)?.0)),
        command::DEVICE_GET_INFO => {
            enough(split::<DeviceInfo>(body)?.0.argsz, size_of::<DeviceInfo>(), Request::DeviceInfo)
        }
        command::DEVICE_GET_REGION_INFO => {
            let info = split::<RegionInfo>(body)?.0;
            enough(info.argsz, size_of::<RegionInfo>(), Request::RegionInfo(info.index.get()))
        }
        command::DEVICE_GET_IRQ_INFO => {
            let info = split::<IrqInfo>(body)?.0;
            enough(info.argsz, size_of::<IrqInfo>(), Request::IrqInfo(info.index.get()))
        }
        command::DEVICE_SET_IRQS => parse_set_irqs(body),
        command::REGION_READ => {
            let access = split::<RegionAccess>(body)?.0;
            if access.count.get() as usize > MAX_TRANSFER {
                return Err(Errno::TOOBIG);
            }
            Ok(Request::Read(access))
        }
        command::REGION_WRITE => {
            let (access, data) = split::<RegionAccess>(body)?;
            let data = data.get(..access.count.get() as usize).ok_or(Errno::INVAL)?;
            Ok(Request::Write(access, data))
        }
        command::REGION_WRITE_MULTI => {
            let (count, data) = split::<U64>(body)?;
            let count = usize::try_from(count.get())
                .ok()
                .filter(|count| *count <= MAX_WRITES)
                .ok_or(Errno::TOOBIG)?;
            let (writes, _) =
                <[SmallWrite]>::ref_from_prefix_with_elems(data, count).map_err(|_| Errno::INVAL)?;
            if writes.iter().any(|write| write.count.get() > 8) {
                return Err(Errno::INVAL);
            }
            Ok(Request::WriteMulti(writes))
        }
        command::DEVICE_RESET => Ok(Request::Reset),
        _ => Err(Errno::OPNOTSUPP),
    }
}

fn parse_set_irqs(body: &[u8]) -> Result<Request<'_>, Errno> {
    let (set, data) = split::<IrqSet>(body)?;
    let flags = set.flags.get();
    // Nothing offered can be masked, so the only action is to trigger.
    if flags & vfio::VFIO_IRQ_SET_ACTION_TYPE_MASK != vfio::VFIO_IRQ_SET_ACTION_TRIGGER {
        return Err(Errno::INVAL);
    }
    let action = match flags & vfio::VFIO_IRQ_SET_DATA_TYPE_MASK {
        vfio::VFIO_IRQ_SET_DATA_EVENTFD => IrqAction::Eventfds,
        vfio::VFIO_IRQ_SET_DATA_NONE => IrqAction::Trigger,
        vfio::VFIO_IRQ_SET_DATA_BOOL => {
            IrqAction::TriggerIf(data.get(..set.count.get() as usize).ok_or(Errno::INVAL)?)
        }
        _ => return Err(Errno::INVAL),
    };
    Ok(Request::SetIrqs { index: set.index.get(), start: set.start.get(), count: set.count.get(), action })
}

fn split<T: FromBytes + KnownLayout + Immutable + Unaligned>(body: &[u8]) -> Result<(&T, &[u8]), Errno> {
    T::ref_from_prefix(body).map_err(|_| Errno::INVAL)
}

/// `argsz` of a request is the room for the reply's body.
fn enough<'a>(argsz: U32, needed: usize, request: Request<'a>) -> Result<Request<'a>, Errno> {
    if (argsz.get() as usize) < needed { Err(Errno::INVAL) } else { Ok(request) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn version_data_must_be_terminated() {
        assert_eq!(parse(command::VERSION, &[]), Err(Errno::INVAL));
        assert_eq!(parse(command::VERSION, &[0, 0, 1]), Err(Errno::INVAL));
        assert_eq!(
            parse(command::VERSION, &[0, 0, 1, 0]),
            Ok(Request::Version { major: 0, minor: 1, data: b"" })
        );
        assert_eq!(
            parse(command::VERSION, b"\0\0\0\0{}\0"),
            Ok(Request::Version { major: 0, minor: 0, data: b"{}" })
        );
        assert_eq!(parse(command::VERSION, b"\0\0\0\0{}"), Err(Errno::INVAL));
    }

    #[test]
    fn counts_are_bounded_by_the_message() {
        let mut access = RegionAccess { count: U32::new(u32::MAX), ..Default::default() };
        assert_eq!(parse(command::REGION_READ, access.as_bytes()), Err(Errno::TOOBIG));
        assert_eq!(parse(command::REGION_WRITE, access.as_bytes()), Err(Errno::INVAL));
        access.count = U32::ZERO;
        assert_eq!(parse(command::REGION_WRITE, access.as_bytes()), Ok(Request::Write(&access, &[])));
        assert_eq!(parse(command::REGION_WRITE_MULTI, &u64::MAX.to_ne_bytes()), Err(Errno::TOOBIG));
        assert_eq!(parse(command::REGION_WRITE_MULTI, &1u64.to_ne_bytes()), Err(Errno::INVAL));
        assert_eq!(parse(command::REGION_WRITE_MULTI, &0u64.to_ne_bytes()), Ok(Request::WriteMulti(&[])));
    }

    #[test]
    fn what_is_not_offered_is_refused() {
        for command in [0, 6, 11, 12, 14, 16, 17, 18, u16::MAX] {
            assert_eq!(parse(command, &[0; 64]), Err(Errno::OPNOTSUPP));
        }
        let mask = IrqSet {
            flags: U32::new(vfio::VFIO_IRQ_SET_DATA_NONE | vfio::VFIO_IRQ_SET_ACTION_MASK),
            ..Default::default()
        };
        assert_eq!(parse(command::DEVICE_SET_IRQS, mask.as_bytes()), Err(Errno::INVAL));
    }

    proptest! {
        #[test]
        fn any_bytes_parse_or_fail(command in 0u16..20, body in prop::collection::vec(any::<u8>(), 0..256)) {
            let _ = parse(command, &body);
        }

        #[test]
        fn a_reply_repeats_id_and_command(bytes: [u8; 16], errno in 1i32..134) {
            let header = Header::read_from_bytes(&bytes).unwrap();
            let reply = header.failure(Errno::from_raw_os_error(errno));
            prop_assert!(reply.is_reply() && !reply.is_request());
            prop_assert_eq!((reply.id, reply.command, reply.size.get()), (header.id, header.command, 16));
            prop_assert_eq!(reply.failed(), Some(errno as u32));
        }
    }
}
