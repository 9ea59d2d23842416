// SPDX-License-Identifier: MIT OR Apache-2.0
//! What bus, interrupts and memory ask of KVM: a trait, so that they are tested without it.

use std::collections::BTreeMap;
use std::io;

use kvm_bindings::{
    KVM_IRQ_ROUTING_IRQCHIP, KVM_IRQ_ROUTING_MSI, KVM_IRQCHIP_IOAPIC, KVM_IRQCHIP_PIC_MASTER,
    KVM_IRQCHIP_PIC_SLAVE, KvmIrqRouting, kvm_irq_routing_entry, kvm_irq_routing_entry__bindgen_ty_1,
    kvm_irq_routing_irqchip, kvm_irq_routing_msi, kvm_userspace_memory_region,
};
use kvm_ioctls::VmFd;
use vm_memory::MmapRegion;
use vmm_sys_util::eventfd::EventFd;

/// Pins of the I/O interrupt controller, which are the first interrupt numbers.
pub(super) const PINS: u32 = 24;
/// Pins of the two old controllers.
const OLD_PINS: u32 = 16;

/// What an interrupt is to the processors.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Message {
    pub(super) address: u64,
    pub(super) data: u32,
}

/// The hypervisor's side.
pub(super) trait Host: Send + Sync {
    /// Replaces what interrupt numbers from [`PINS`] on mean.
    fn route(&self, messages: &BTreeMap<u32, Message>) -> io::Result<()>;
    /// Makes a signal of `event` the interrupt of that number.
    fn connect(&self, event: &EventFd, number: u32) -> io::Result<()>;
    /// Undoes [`Self::connect`].
    fn disconnect(&self, event: &EventFd, number: u32);
    /// Shows the guest all of `map` at `start`. The slot must not be in use.
    fn show(&self, slot: u32, start: u64, map: &MmapRegion<()>) -> io::Result<()>;
    /// Takes that away.
    fn hide(&self, slot: u32, start: u64) -> io::Result<()>;
}

impl Host for VmFd {
    fn route(&self, messages: &BTreeMap<u32, Message>) -> io::Result<()> {
        let pin = |gsi, irqchip, pin| kvm_irq_routing_entry {
            gsi,
            type_: KVM_IRQ_ROUTING_IRQCHIP,
            u: kvm_irq_routing_entry__bindgen_ty_1 { irqchip: kvm_irq_routing_irqchip { irqchip, pin } },
            ..Default::default()
        };
        let mut entries = Vec::with_capacity((PINS + OLD_PINS) as usize + messages.len());
        for number in 0..OLD_PINS {
            let chip = if number < 8 { KVM_IRQCHIP_PIC_MASTER } else { KVM_IRQCHIP_PIC_SLAVE };
            entries.push(pin(number, chip, number % 8));
        }
        entries.extend((0..PINS).map(|number| pin(number, KVM_IRQCHIP_IOAPIC, number)));
        entries.extend(messages.iter().map(|(&gsi, message)| kvm_irq_routing_entry {
            gsi,
            type_: KVM_IRQ_ROUTING_MSI,
            u: kvm_irq_routing_entry__bindgen_ty_1 {
                msi: kvm_irq_routing_msi {
                    address_lo: message.address as u32,
                    address_hi: (message.address >> 32) as u32,
                    data: message.data,
                    ..Default::default()
                },
            },
            ..Default::default()
        }));
        let routing =
            KvmIrqRouting::from_entries(&entries).map_err(|_| io::Error::other("too many routes"))?;
        Ok(self.set_gsi_routing(&routing)?)
    }

    fn connect(&self, event: &EventFd, number: u32) -> io::Result<()> {
        Ok(self.register_irqfd(event, number)?)
    }

    fn disconnect(&self, event: &EventFd, number: u32) {
        // Fails only for what was never connected.
        let _ = self.unregister_irqfd(event, number);
    }

    fn show(&self, slot: u32, start: u64, map: &MmapRegion<()>) -> io::Result<()> {
        let region = kvm_userspace_memory_region {
            slot,
            flags: 0,
            guest_phys_addr: start,
            memory_size: map.size() as u64,
            userspace_addr: map.as_ptr() as u64,
        };
        #[allow(unsafe_code)] // the only way to give KVM memory
        // SAFETY: the memory is a mapping of the RAM's or a BAR's file. Its owner keeps it until no processor runs any more or
        // the slot has been taken away. What the guest writes there is read in this process through volatile accesses only.
        unsafe {
            Ok(self.set_user_memory_region(region)?)
        }
    }

    fn hide(&self, slot: u32, start: u64) -> io::Result<()> {
        let region = kvm_userspace_memory_region { slot, guest_phys_addr: start, ..Default::default() };
        #[allow(unsafe_code)] // see above
        // SAFETY: a size of zero takes memory away from the guest.
        unsafe {
            Ok(self.set_user_memory_region(region)?)
        }
    }
}
