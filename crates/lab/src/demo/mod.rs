//! `whimbrel-lab demo`: a running machine moves between two hosts, and everything is measured and checked.

mod figures;
mod narrator;

pub use figures::{Figures, Setting, mib, shown};
pub use narrator::Narrator;

use crate::compare::{self, Theirs};
use crate::link::LinkArgs;
use crate::screen::Screen;
use clap::Args;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;
use whimbrel_lab::net::Host;
use whimbrel_lab::pair::journey::{Route, travel};
use whimbrel_lab::pair::{Guest, GuestSpec, Pair, PairError, PairSpec};
use whimbrel_workload::params::Pace;

/// The machine's name, and its volume's.
const NAME: &str = "demo";

/// What is not moved but takes time: start, boot, rates before and after, the check.
const AROUND: Duration = Duration::from_secs(60);

#[derive(Debug, Args)]
pub struct DemoArgs {
    /// Write all figures into this file as JSON
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// Afterwards move the same guest by QEMU's own means, over the same link
    #[arg(long)]
    compare: bool,
    /// Seconds that QEMU's own move may take
    #[arg(long, value_name = "S", default_value_t = 240)]
    compare_limit: u64,
    /// Keep the hosts' files (state, logs, disks), and say where they are
    #[arg(long)]
    keep: bool,
    /// A smaller guest: 256 MiB of RAM, 150 MiB of files
    #[arg(long)]
    quick: bool,
    /// Pages of 4 KiB that the guest writes per second, all over its hot set
    #[arg(long, value_name = "N", default_value_t = 2000)]
    ram_pages: u32,
    /// How content is written: as for `whimbrel migrate`
    #[arg(long, value_name = "CODEC", default_value = "auto")]
    compress: String,
    /// How disks go: as for `whimbrel migrate`
    #[arg(long, value_name = "WAY", default_value = "postcopy")]
    disks: String,
    #[command(flatten)]
    link: LinkArgs,
}

impl DemoArgs {
    fn guest(&self) -> GuestSpec {
        let mut spec = if self.quick {
            GuestSpec::medium(NAME)
        } else {
            GuestSpec::large(NAME)
        };
        spec.params.ram.pace = match self.ram_pages {
            0 => Pace::Off,
            pages => Pace::PerSecond(pages),
        };
        spec
    }

    /// What has to cross the link, about: the files, and the RAM that a guest of this kind uses.
    fn expected_bytes(&self) -> u64 {
        let spec = self.guest();
        let ram = u64::from(spec.params.ram.region_mib) + 130;
        (spec.disk.files_mib + ram) << 20
    }
}

pub fn run(args: &DemoArgs) -> ExitCode {
    let mut screen = Screen::new();
    match play(args, &mut screen) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            screen.put(&format!("The demo could not go on: {error}"));
            ExitCode::FAILURE
        }
    }
}

fn announce(args: &DemoArgs, screen: &mut Screen) {
    let spec = args.guest();
    let seconds = args.link.time_for(args.expected_bytes()) + AROUND;
    let compared = match args.compare {
        true => format!(
            ", then QEMU's own way for at most {} s more",
            args.compare_limit + AROUND.as_secs()
        ),
        false => String::new(),
    };
    screen.put(&format!(
        "A running machine ({} MiB of RAM, a {} MiB disk with {} MiB of files) moves from host-a to host-b\n\
         over {}, and is checked to the last byte. About {} s{compared}.",
        spec.memory_mib,
        spec.disk.size_mib,
        spec.disk.files_mib,
        args.link.describe(),
        seconds.as_secs(),
    ));
}

/// Whether everything was right.
fn play(args: &DemoArgs, screen: &mut Screen) -> Result<bool, PairError> {
    announce(args, screen);
    let spec = args.guest();
    screen.while_doing(
        "kernel, initramfs and disk (half a minute the first time, then kept)",
        || spec.build(),
    )?;
    let mut pair = Pair::start(&PairSpec::new(args.link.lab()))?;
    if args.keep {
        pair.keep_files();
    }
    screen.say("two hosts are up and trust each other's keys");
    let mut guest = Guest::new(pair.lab(), spec.clone())?;
    screen.while_doing("importing the disk", || pair.define(Host::A, &guest))?;
    screen.say("host-a has the disk and the machine's description");
    let boot = screen.while_doing("booting (no KVM needed, hence slow)", || {
        pair.boot(Host::A, &mut guest)
    })?;
    screen.say(&format!(
        "the guest runs on host-a, its workloads at work after {:.1} s",
        boot.as_secs_f64()
    ));

    let mut route = Route::from(Host::A);
    let ways = [("--compress", &args.compress), ("--disks", &args.disks)];
    route.options = ways
        .iter()
        .flat_map(|(option, way)| [option.to_string(), way.to_string()])
        .collect();
    let mut narrator = Narrator::new(screen);
    let journey = travel(&pair, &mut guest, &route, |moment| narrator.hear(moment))?;

    let arrived = journey.ended.completed();
    let verdict = match arrived {
        true => {
            let work = || pair.finish(Host::B, &mut guest);
            let verdict = screen.while_doing(
                "the guest checks all its pages and shuts down; its disk is checked from outside",
                work,
            );
            Some(verdict.map_err(|error| error.to_string()))
        }
        false => None,
    };
    let setting = Setting::of(&args.link, &spec);
    let mut figures = Figures::gather(setting, &journey, verdict.as_ref());
    screen.put("");
    screen.put(&figures.text());

    drop(guest);
    if args.compare {
        let limit = Duration::from_secs(args.compare_limit);
        let theirs = compare::run(&pair, &spec, &args.link, limit, screen);
        screen.put("");
        screen.put(&compare::columns(&figures, &theirs));
        figures.qemu = Some(theirs);
    }
    if let Some(path) = &args.json {
        write_json(path, &figures)?;
        screen.put(&format!("All figures are in {}.", path.display()));
    }
    if args.keep {
        let path = pair.folder().path().display();
        screen.put(&format!("The hosts' files are in {path}."));
    }
    Ok(figures.problems.is_empty() && figures.qemu.as_ref().is_none_or(Theirs::is_sound))
}

pub fn write_json(
    path: &std::path::Path,
    figures: &impl serde::Serialize,
) -> Result<(), PairError> {
    let text = serde_json::to_string_pretty(figures).expect("plain structs serialise");
    std::fs::write(path, text + "\n").map_err(|source| PairError::Io {
        action: "write",
        path: path.to_owned(),
        source,
    })
}
