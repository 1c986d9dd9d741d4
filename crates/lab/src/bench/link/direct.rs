//! The hosts joined by a cable: what a move makes of it, beside a bare copy of the same file over TLS.

use super::LinkArgs;
use super::row::disk_file;
use crate::screen::Screen;
use serde::Serialize;
use std::path::Path;
use std::time::{Duration, Instant};
use whimbrel_lab::links::{HELD, Rig, copy};
use whimbrel_lab::net::{Host, LabSpec};
use whimbrel_lab::pair::{Pair, PairError, PairSpec};
use whimbrel_lab::wan::{LineSpec, WanSpec};

const DISK: u64 = 1536 << 20;

const WITHIN: Duration = Duration::from_secs(120);

#[derive(Clone, Debug, Serialize)]
pub struct Direct {
    pub bytes: u64,
    /// Bytes of content a second, from letting push go until all is there.
    pub goodput: f64,
    /// Once it was under way: from a quarter of the content to three.
    pub middle: Option<f64>,
    /// Of bare copies, one before the move and one after it.
    pub tls: [f64; 2],
    pub cipher: String,
    /// CPU seconds of both daemons.
    pub cpu_s: f64,
}

impl Direct {
    fn share(&self) -> f64 {
        self.goodput * 2.0 / (self.tls[0] + self.tls[1])
    }

    pub fn text(&self) -> String {
        let mb = |rate: f64| rate / 1e6;
        format!(
            "without emulation: {} MiB in {:.2} s, {:.0} MB/s ({:.0} in its middle, {:.2} CPU s); bare TLS ({}) {:.0} and {:.0} MB/s: {:.0} %{}",
            self.bytes >> 20,
            self.bytes as f64 / self.goodput,
            mb(self.goodput),
            mb(self.middle.unwrap_or_default()),
            self.cpu_s,
            self.cipher,
            mb(self.tls[0]),
            mb(self.tls[1]),
            self.share() * 100.0,
            if self.share() < 0.8 { " *" } else { "" },
        )
    }

    pub fn measure(
        args: &LinkArgs,
        folder: &Path,
        screen: &mut Screen,
    ) -> Result<Direct, PairError> {
        let bytes = if args.quick { DISK / 2 } else { DISK };
        let disk = disk_file(folder, bytes, screen)?;
        let cable = WanSpec::symmetric(LineSpec::unlimited(Duration::ZERO));
        let mut spec = PairSpec::new(LabSpec::new(cable));
        for site in [&mut spec.a, &mut spec.b] {
            site.log = args.log.clone();
        }
        let mut pair = Pair::prepare(&spec)?;
        if args.log.is_some() {
            pair.keep_files();
            screen.put(&format!("files are in {}", pair.folder().path().display()));
        }
        pair.lab().bypass()?;
        for host in Host::BOTH {
            pair.site_mut(host).start()?;
        }
        let rig = Rig::new(pair, &disk)?;
        let bare = || {
            let to = rig.pair().folder().path().join("copy");
            let copied = copy::tls(rig.pair().lab(), &disk, &to)?;
            let _ = std::fs::remove_file(&to);
            Ok::<_, PairError>(copied)
        };
        screen.live("bare TLS");
        let first = bare()?;
        screen.live("the move");
        rig.depart(HELD)?;
        let mut arrivals = rig.arrivals()?;
        let cpu = rig.cpu()?;
        let released = Instant::now();
        rig.throttle("unlimited")?;
        arrivals.until(released + WITHIN, |_| true)?;
        let cpu_s = rig.cpu()? - cpu;
        screen.live("bare TLS");
        let second = bare()?;
        let last = arrivals.series().last();
        let end = last.map_or(Instant::now(), |last| last.at);
        let part = |share: f64| {
            let is_there = |bytes: u64| bytes as f64 >= share * rig.bytes() as f64;
            arrivals
                .series()
                .iter()
                .find(|a| is_there(a.bytes))
                .map(|a| a.at)
        };
        let middle = match (part(0.25), part(0.75)) {
            (Some(from), Some(to)) => arrivals.rate(from, to).map(|bits| bits / 8.0),
            _ => None,
        };
        let speed = |seconds: f64| rig.bytes() as f64 / seconds;
        Ok(Direct {
            bytes: rig.bytes(),
            goodput: speed((end - released).as_secs_f64()),
            middle,
            tls: [speed(first.seconds), speed(second.seconds)],
            cipher: first.cipher,
            cpu_s,
        })
    }
}
