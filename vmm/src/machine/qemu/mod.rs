// SPDX-License-Identifier: MIT OR Apache-2.0
//! The QEMU machine: QEMU runs the guest, this process serves the functions over vfio-user.
//!
//! Nothing outlives the testbench, `kill -9` included: QEMU gets the kernel's parent-death signal (see [`child`]), its sockets have
//! no names ([`rendezvous`]), guest memory and the initial file system are anonymous files.

mod child;
mod command;
mod monitor;
mod rendezvous;

use std::io::{self, Read, Write};
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::Duration;

use qapi::qmp::inject_nmi;

use self::child::Process;
use self::monitor::{Monitor, Story};
use self::rendezvous::Rendezvous;
use super::terminal::Terminal;
use super::vfio_user::{Connection, Server};
use super::{ConsoleSink, Machine, MachineConfig, MachineExit};
use crate::failure::{Failure, Result};
use crate::provision::QemuProgram;

/// Starts a guest.
///
/// # Errors
/// If QEMU cannot be started. That it refuses its arguments, or the guest its kernel, is seen by waiting.
pub fn start(program: &QemuProgram, config: MachineConfig) -> Result<Box<dyn Machine>> {
    start_any(program, config, None)
}

/// A byte stream to the programs in a guest: a virtio-serial port.
pub struct Port {
    /// What the guest finds it by.
    pub name: &'static str,
    /// The guest's end.
    pub socket: UnixStream,
    /// The guest gets an IOMMU, to hand devices on to its own guest.
    pub iommu: bool,
    /// QEMU's arguments for such a device, beside the functions.
    pub handed: Option<&'static str>,
}

/// Starts a guest that is to run guests itself: its processor has virtualisation, emulated by the translator.
///
/// # Errors
/// As [`start`].
pub fn start_outer(program: &QemuProgram, config: MachineConfig, port: Port) -> Result<Box<dyn Machine>> {
    start_any(program, config, Some(port))
}

fn start_any(program: &QemuProgram, config: MachineConfig, port: Option<Port>) -> Result<Box<dyn Machine>> {
    let machine = try_start(program, config, port).map_err(|error| {
        Failure::environment(format!("cannot start QEMU ({}): {error}", program.program.display()))
    })?;
    Ok(Box::new(machine))
}

fn try_start(program: &QemuProgram, config: MachineConfig, port: Option<Port>) -> io::Result<QemuMachine> {
    for (index, slot) in config.functions.iter().enumerate() {
        if config.functions[..index].iter().any(|other| Arc::ptr_eq(&other.memory, &slot.memory)) {
            return Err(io::Error::other(format!(
                "{} shares its view of memory with another function",
                slot.name
            )));
        }
    }
    let (console, console_theirs) = UnixStream::pair()?;
    let (monitor, monitor_theirs) = UnixStream::pair()?;
    let (mut inherited, mut functions, mut servers) = (Vec::new(), Vec::new(), Vec::new());
    let mut inherit = |fd: OwnedFd| -> RawFd {
        let number = fd.as_raw_fd();
        inherited.push(fd);
        number
    };
    let places = rendezvous::rendezvous(config.functions.len())?;
    for (slot, Rendezvous { listener, location }) in config.functions.into_iter().zip(places) {
        functions.push((slot.name, inherit(location)));
        servers.push(Server::start(slot, Connection::Listener(listener))?);
    }
    let arguments = command::arguments(&command::Parts {
        kernel: &config.kernel,
        cmdline: &config.cmdline,
        cpus: config.cpus,
        memory_bytes: config.memory_bytes,
        nodes: config.nodes,
        accel: config.accel,
        initramfs: inherit(config.initramfs.into()),
        console: inherit(console_theirs.into()),
        monitor: inherit(monitor_theirs.into()),
        functions: &functions,
        iommu: port.as_ref().is_some_and(|port| port.iommu),
        handed: port.as_ref().and_then(|port| port.handed),
        port: port.map(|port| (port.name, inherit(port.socket.into()))),
    });
    let mut command = program.command();
    command.args(arguments);
    let process = Process::start(command, inherited)?;
    let terminal = if config.interactive {
        let killer = process.killer();
        Some(Terminal::attach(console.try_clone()?, move || killer.kill())?)
    } else {
        None
    };
    Ok(QemuMachine {
        monitor: Monitor::new(monitor)?,
        console: Some(read_console(console, config.console, config.interactive)?),
        terminal,
        process,
        servers,
        exit: None,
    })
}

/// Follows the console until QEMU closes it.
fn read_console(mut stream: UnixStream, mut sink: ConsoleSink, show: bool) -> io::Result<JoinHandle<()>> {
    std::thread::Builder::new().name("console".into()).spawn(move || {
        let mut buffer = [0; 4096];
        let terminal = io::stdout();
        loop {
            match stream.read(&mut buffer) {
                Ok(0) => return,
                Ok(count) => {
                    if show {
                        let mut terminal = terminal.lock();
                        let _ = terminal.write_all(&buffer[..count]).and_then(|()| terminal.flush());
                    }
                    sink(&buffer[..count]);
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(_) => return,
            }
        }
    })
}

/// The fields are dropped in this order: the terminal is given back first, then QEMU ends, then what served it.
struct QemuMachine {
    terminal: Option<Terminal>,
    process: Process,
    monitor: Monitor,
    console: Option<JoinHandle<()>>,
    servers: Vec<Server>,
    exit: Option<MachineExit>,
}

impl QemuMachine {
    /// After QEMU's end: whether the threads that it spoke to have come to theirs.
    ///
    /// They may wait for room in the queue that the caller of [`Machine::wait`] empties, and so must not be waited for.
    fn is_quiet(&self, patience: Duration) -> bool {
        self.servers.iter().for_each(Server::hang_up);
        super::last_words(patience, || {
            self.console.as_ref().is_none_or(JoinHandle::is_finished)
                && self.servers.iter().all(Server::is_over)
        })
    }

    /// Collects everything after QEMU's end. All sockets to it are closed, so nothing here waits for anybody.
    fn finish(&mut self, status: String, success: bool, stderr_tail: String) -> MachineExit {
        self.terminal = None;
        let story = self.monitor.finish();
        if let Some(console) = self.console.take() {
            let _ = console.join();
        }
        let mut broken = None;
        for server in &mut self.servers {
            if let Err(error) = server.stop() {
                broken.get_or_insert(error);
            }
        }
        let Story { shutdown, panicked } = story;
        let reason = shutdown.as_ref().map(|(_, reason)| reason.as_str());
        let status = match reason {
            _ if panicked => "the guest reported a panic".to_owned(),
            Some("guest-shutdown") if success => return MachineExit::PoweredOff,
            Some("guest-reset") => "the guest reset itself: a panic, a triple fault or a reboot".to_owned(),
            _ => match broken {
                Some(error) => format!("QEMU {status} after a function's connection broke: {error}"),
                None => format!("QEMU {status}"),
            },
        };
        MachineExit::Died { status, stderr_tail }
    }
}

impl Machine for QemuMachine {
    fn wait(&mut self, timeout: Duration) -> Option<MachineExit> {
        if self.exit.is_none() {
            let (status, success, stderr_tail) = self.process.wait(timeout)?;
            if !self.is_quiet(timeout) {
                return None;
            }
            self.exit = Some(self.finish(status, success, stderr_tail));
        }
        self.exit.clone()
    }

    fn kill(&mut self) {
        self.terminal = None;
        self.process.kill();
    }

    fn nmi(&mut self) -> Result<()> {
        self.monitor
            .execute(&inject_nmi {})
            .map_err(|error| Failure::inconclusive(format!("cannot send the guest an interrupt: {error}")))
    }

    fn pid(&self) -> Option<u32> {
        Some(self.process.pid())
    }
}

#[cfg(test)]
mod tests {
    use std::process::Command;
    use std::sync::mpsc::sync_channel;

    use super::*;

    #[test]
    fn its_end_does_not_wait_for_who_waits_for_it() {
        let (console, mut theirs) = UnixStream::pair().unwrap();
        let (monitor, monitor_theirs) = UnixStream::pair().unwrap();
        let (queue, inputs) = sync_channel(1);
        let sink: ConsoleSink = Box::new(move |bytes| {
            let _ = queue.send(bytes.to_vec());
        });
        let mut machine = QemuMachine {
            terminal: None,
            process: Process::start(Command::new("true"), Vec::new()).unwrap(),
            monitor: Monitor::new(monitor).unwrap(),
            console: Some(read_console(console, sink, false).unwrap()),
            servers: Vec::new(),
            exit: None,
        };
        // More than the queue holds, one piece at a time, and then the end.
        for _ in 0..4 {
            theirs.write_all(&[b'x'; 4096]).unwrap();
        }
        drop((theirs, monitor_theirs));
        let (done, finished) = std::sync::mpsc::channel();
        std::thread::spawn(move || {
            let mut pieces = 0;
            loop {
                let exit = machine.wait(Duration::ZERO);
                pieces += inputs.try_iter().count();
                if exit.is_some() {
                    let _ = done.send(pieces);
                    return;
                }
            }
        });
        assert!(finished.recv_timeout(Duration::from_secs(20)).is_ok_and(|pieces| pieces >= 4));
    }
}
