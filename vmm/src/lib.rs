// SPDX-License-Identifier: MIT OR Apache-2.0
//! The testbench: machines that show the virtual GPU to a guest, what they need, and the runs that judge a driver.

pub mod bench;
pub mod cli;
pub mod console;
pub mod doctor;
pub mod event;
pub mod failure;
pub mod gates;
pub mod initramfs;
pub mod machine;
pub mod mutants;
pub mod nested;
pub mod process;
pub mod provision;
pub mod report;
pub mod runner;
