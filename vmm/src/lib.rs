// SPDX-License-Identifier: MIT OR Apache-2.0
//! The testbench: machines that show the virtual GPU to a guest, what they need, and the runs that judge a driver.

pub mod event;
pub mod failure;
