//! `whimbrel-lab bench ...`: what is measured or tried over and over.

mod cap;
mod chaos;
mod codec;
mod disks;
mod guard;
mod guests;
mod kills;
mod link;
mod nbd;
mod ram;
mod soak;
mod workingset;

use crate::demo::write_json;
use crate::screen::Screen;
use clap::Subcommand;
use serde::Serialize;
use std::path::PathBuf;
use std::process::ExitCode;

#[derive(Debug, Subcommand)]
pub enum Bench {
    /// Many moves under different links and loads; no error is allowed
    Soak(soak::SoakArgs),
    /// A guest beside its own copies on a disk too slow for both
    Guard(guard::GuardArgs),
    /// Machines as people have them, each moved there and back: devices, memory, what guests do meanwhile
    Guests(guests::GuestsArgs),
    /// Daemons killed under `fio --verify` while a volume is relocated; nothing may be lost
    Kills(kills::KillsArgs),
    /// What push makes of links of all kinds, and what demands wait beside it
    Link(link::LinkArgs),
    /// What `--compress auto` costs beside the best fixed choice, by data and link
    Codec(codec::CodecArgs),
    /// Whether a bandwidth that was set holds, and how soon a new one does
    Cap(cap::CapArgs),
    /// Each process of a move killed, and the link cut, in each phase: the crash table on real QEMUs
    Chaos(chaos::ChaosArgs),
    /// Whimbrel's NBD export beside qemu-nbd and nbdkit, on the same file
    Nbd(nbd::NbdArgs),
    /// How RAM moves, by Whimbrel and by QEMU's own ways
    Ram(ram::RamArgs),
    /// How guests move with their disks, by Whimbrel and by QEMU's own ways
    Disks(disks::DisksArgs),
    /// How good the working-set estimators are, on traces
    #[command(name = "workingset")]
    WorkingSet(workingset::WorkingSetArgs),
    /// Serve one file as `bench nbd` wants it served
    #[command(hide = true)]
    NbdExport(nbd::ExportArgs),
}

impl Bench {
    pub fn run(&self) -> ExitCode {
        match self {
            Bench::Soak(args) => soak::run(args),
            Bench::Guard(args) => guard::run(args),
            Bench::Guests(args) => guests::run(args),
            Bench::Kills(args) => kills::run(args),
            Bench::Link(args) => link::run(args),
            Bench::Codec(args) => codec::run(args),
            Bench::Cap(args) => cap::run(args),
            Bench::Chaos(args) => chaos::run(args),
            Bench::Nbd(args) => nbd::run(args),
            Bench::Ram(args) => ram::run(args),
            Bench::Disks(args) => disks::run(args),
            Bench::WorkingSet(args) => workingset::run(args),
            Bench::NbdExport(args) => nbd::export(args),
        }
    }
}

/// How a bench ends: its figures in a file if one was named. Figures are told, not judged: only what is wrong, or
/// kept one from being taken, is a failure.
fn ended(
    screen: &mut Screen,
    json: &Option<PathBuf>,
    figures: &impl Serialize,
    sound: bool,
) -> ExitCode {
    if let Some(path) = json
        && let Err(error) = write_json(path, figures)
    {
        screen.put(&error.to_string());
        return ExitCode::FAILURE;
    }
    if sound {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    }
}
