// SPDX-License-Identifier: MIT OR Apache-2.0
//! A vfio-user server: shows one [`Function`](vgpu::function::Function) to one client over one Unix socket.
//!
//! The client is not trusted: a guest that has taken over its hypervisor must not take over the testbench. So
//! [`wire`] turns bytes into requests and touches nothing else, [`session`] carries requests out and knows no socket,
//! [`transport`] moves whole messages with their file descriptors within fixed bounds, and [`server`] is the thread that joins
//! the three. Everything a client can get wrong is answered with an error number, and the stream stays in step; only a
//! message whose length cannot be believed ends the connection.
//!
//! The protocol is the one of QEMU's `docs/interop/vfio-user.rst`, version 0.0.

pub mod interrupts;
pub mod server;
pub mod session;
pub mod transport;
pub mod wire;

#[cfg(test)]
mod server_test;

pub use server::{Connection, Server};
pub use session::session_for_fuzzing;
