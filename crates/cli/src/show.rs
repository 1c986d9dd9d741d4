//! Views as people read them.

use crate::output::{pairs, table};
use whimbrel_engine::space::SpaceKind;
use whimbrel_host::api::{
    CodecUnits, Compress, DeltaStats, DemandStats, GuestIo, HostView, InvitationView, InviteView,
    JoinView, LinkView, MachineStatus, MachineView, MigrationReport, MigrationState, MigrationView,
    PeerView, SentBytes, VolumeView,
};
use whimbrel_host::state::{ByteSize, Rate};

/// Thousandths as a percentage with one digit.
pub fn percent(permille: u16) -> String {
    format!("{}.{} %", permille / 10, permille % 10)
}

pub fn bytes(count: u64) -> String {
    ByteSize(count).approx()
}

/// Milliseconds, with a digit after the point below ten.
pub fn millis(ms: f64) -> String {
    if ms < 10.0 {
        format!("{ms:.1} ms")
    } else {
        format!("{ms:.0} ms")
    }
}

/// Seconds as people say them: `1m 30s`.
pub fn seconds(seconds: u64) -> String {
    humantime::format_duration(std::time::Duration::from_secs(seconds)).to_string()
}

pub fn status(status: MachineStatus) -> &'static str {
    match status {
        MachineStatus::Defined => "defined",
        MachineStatus::Running => "running",
        MachineStatus::Paused => "paused",
        MachineStatus::Arriving => "arriving",
        MachineStatus::Departed => "departed",
        MachineStatus::Crashed => "crashed",
        MachineStatus::NeedsOperator => "needs operator",
    }
}

pub fn state(state: MigrationState) -> &'static str {
    match state {
        MigrationState::Running => "running",
        MigrationState::Held => "held",
        MigrationState::Waiting => "waiting for the link",
        MigrationState::Completed => "completed",
        MigrationState::Cancelled => "cancelled",
        MigrationState::Failed => "failed",
        MigrationState::NeedsOperator => "needs operator",
    }
}

/// `up 30 ms`, or `down 12s: what it waits for`.
pub fn link(link: &LinkView) -> String {
    let age = seconds(link.since.age().as_secs());
    match (link.connected, &link.waiting_for, link.rtt_ms) {
        (true, _, Some(rtt)) => format!("up {}", millis(rtt)),
        (true, _, None) => "up".to_string(),
        (false, Some(what), _) => format!("down {age}: {what}"),
        (false, None, _) => format!("down {age}"),
    }
}

fn guest_io(g: &GuestIo) -> String {
    if g.requests == 0 {
        return "none".to_string();
    }
    let held = match g.bound.0 {
        None => "no bound".to_string(),
        Some(_) if g.held_ms == 0.0 => format!("within {}", g.bound),
        Some(_) => format!(
            "push held back for {:.1} s to keep to {}",
            g.held_ms / 1000.0,
            g.bound
        ),
    };
    format!(
        "{} requests, p50 {}, p99 {}, longest {}; {held}",
        g.requests,
        millis(g.p50_ms),
        millis(g.p99_ms),
        millis(g.max_ms)
    )
}

fn demands(d: &DemandStats) -> String {
    if d.count == 0 {
        return "none".to_string();
    }
    let DemandStats {
        count,
        p50_ms,
        p99_ms,
        max_ms,
    } = *d;
    format!(
        "{count}, p50 {}, p99 {}, longest {}",
        millis(p50_ms),
        millis(p99_ms),
        millis(max_ms)
    )
}

/// When it will be over; empty if nobody can tell.
pub fn eta(view: &MigrationView) -> String {
    match view.eta {
        None => String::new(),
        Some(eta) => match eta.latest_s {
            None => format!("at least {}", seconds(eta.soonest_s)),
            Some(latest) if latest == eta.soonest_s => seconds(latest),
            Some(latest) => format!("{} to {}", seconds(eta.soonest_s), seconds(latest)),
        },
    }
}

pub fn host(view: &HostView) -> String {
    let mut lines = vec![
        ("name", view.name.to_string()),
        ("key", view.key.to_string()),
        ("listens at", view.listen.clone()),
        ("version", view.version.clone()),
        ("state", view.state_dir.display().to_string()),
    ];
    match &view.daemon {
        None => lines.push(("daemon", "not running".to_string())),
        Some(d) => {
            let networks: Vec<&str> = d.networks.iter().map(|n| n.as_str()).collect();
            lines.extend([
                ("daemon", format!("process {}, since {}", d.pid, d.started)),
                ("qemu", d.qemu.display().to_string()),
                ("networks", networks.join(", ")),
                ("bandwidth", d.bandwidth.to_string()),
                ("machines", d.machines.to_string()),
                ("volumes", d.volumes.to_string()),
                ("migrations", d.migrations.to_string()),
            ]);
        }
    }
    let peers: Vec<&str> = view.peers.iter().map(|p| p.name.as_str()).collect();
    lines.push((
        "trusts",
        if peers.is_empty() {
            "nobody".to_string()
        } else {
            peers.join(", ")
        },
    ));
    pairs(&lines)
}

pub fn peers(peers: &[PeerView]) -> String {
    let rows: Vec<_> = peers
        .iter()
        .map(|p| {
            let addresses: Vec<&str> = p.addresses.iter().map(|a| a.as_str()).collect();
            let link = p.link.as_ref().map_or("-".to_string(), link);
            [
                p.name.to_string(),
                addresses.join(" "),
                p.may.to_string(),
                link,
                p.key.to_string(),
            ]
        })
        .collect();
    table(["NAME", "ADDRESS", "MAY", "LINK", "KEY"], &rows)
}

pub fn invitations(invitations: &[InvitationView]) -> String {
    let rows: Vec<_> = invitations
        .iter()
        .map(|i| {
            let called = i.called.as_ref().map(|name| name.to_string());
            let used = i.used_by.as_ref().map(|used| used.name.to_string());
            [
                i.id.to_string(),
                i.state.to_string(),
                i.expires.to_string(),
                used.or(called).unwrap_or("-".to_string()),
                i.may.to_string(),
            ]
        })
        .collect();
    table(["ID", "STATE", "EXPIRES", "AS", "MAY"], &rows)
}

/// What goes with a token that was just made.
pub fn invited(view: &InviteView) -> String {
    let addresses: Vec<&str> = view.addresses.iter().map(|a| a.as_str()).collect();
    let mut text = format!(
        "\nGood for one host, until {}. On that host: `whimbrel host join TOKEN`, with the line above.\n\
         It will look for this host at {}. Hand the token over as you would a password.",
        view.invitation.expires,
        addresses.join(" and ")
    );
    if !view.daemon {
        text.push_str("\nNo daemon runs here: nobody can join before `whimbrel host run`.");
    }
    text
}

pub fn joined(view: &JoinView) -> String {
    let JoinView { peer, name_there } = view;
    format!(
        "{} is trusted and trusts this host, which it calls {name_there}\n{}",
        peer.name,
        pairs(&[
            ("key", peer.key.to_string()),
            (
                "address",
                peer.addresses
                    .iter()
                    .map(|a| a.as_str())
                    .collect::<Vec<_>>()
                    .join(" ")
            ),
            ("it may", peer.may.to_string()),
        ])
    )
}

pub fn volumes(volumes: &[VolumeView]) -> String {
    let rows: Vec<_> = volumes
        .iter()
        .map(|v| {
            [
                v.name.to_string(),
                bytes(v.size),
                bytes(v.allocated),
                percent(v.resident_permille),
                v.machine
                    .as_ref()
                    .map_or("-".to_string(), |m| m.to_string()),
                v.state.to_string(),
            ]
        })
        .collect();
    table(
        ["NAME", "SIZE", "ALLOCATED", "HERE", "MACHINE", "STATE"],
        &rows,
    )
}

pub fn volume(v: &VolumeView) -> String {
    pairs(&[
        ("name", v.name.to_string()),
        ("uuid", v.uuid.to_string()),
        ("size", format!("{} ({} bytes)", bytes(v.size), v.size)),
        ("allocated", bytes(v.allocated)),
        ("format", v.format.to_string()),
        (
            "awaits",
            if v.awaits {
                "a volume of this name from another host"
            } else {
                ""
            }
            .to_string(),
        ),
        ("here", percent(v.resident_permille)),
        ("state", v.state.to_string()),
        ("epoch", v.epoch.0.to_string()),
        (
            "machine",
            v.machine.as_ref().map_or(String::new(), |m| m.to_string()),
        ),
        ("exported as", v.export.clone().unwrap_or_default()),
        ("data", v.data.display().to_string()),
        ("created", v.created.to_string()),
    ])
}

pub fn machines(machines: &[MachineView]) -> String {
    let rows: Vec<_> = machines
        .iter()
        .map(|m| {
            let disks: Vec<&str> = m.disks.iter().map(|d| d.volume.as_str()).collect();
            [
                m.name.to_string(),
                status(m.status).to_string(),
                m.pid.map_or("-".to_string(), |p| p.to_string()),
                bytes(m.memory),
                m.vcpus.to_string(),
                disks.join(","),
            ]
        })
        .collect();
    table(["NAME", "STATUS", "PID", "MEMORY", "VCPUS", "DISKS"], &rows)
}

pub fn machine(m: &MachineView) -> String {
    let disks: Vec<String> = m
        .disks
        .iter()
        .map(|d| match d.size {
            Some(size) => format!("{} ({})", d.volume, bytes(size)),
            None => d.volume.to_string(),
        })
        .collect();
    let nics: Vec<String> = m
        .nics
        .iter()
        .map(|n| {
            let mac = n.mac.map_or(String::new(), |m| format!(" {m}"));
            let interface = n
                .interface
                .as_ref()
                .map_or(String::new(), |i| format!(" on {i}"));
            format!("{}{mac}{interface}", n.network)
        })
        .collect();
    pairs(&[
        ("name", m.name.to_string()),
        ("status", status(m.status).to_string()),
        ("paused", m.paused_because.clone().unwrap_or_default()),
        ("ownership", m.ownership.to_string()),
        ("epoch", m.epoch.0.to_string()),
        ("pid", m.pid.map_or(String::new(), |p| p.to_string())),
        (
            "qmp",
            m.qmp
                .as_ref()
                .map_or(String::new(), |q| q.display().to_string()),
        ),
        ("memory", bytes(m.memory)),
        ("vcpus", m.vcpus.to_string()),
        ("type", m.machine_type.clone()),
        ("disks", disks.join("\n")),
        ("network", nics.join("\n")),
        (
            "migration",
            m.migration
                .as_ref()
                .map_or(String::new(), |m| m.to_string()),
        ),
    ])
}

pub fn migrations(migrations: &[MigrationView]) -> String {
    let rows: Vec<_> = migrations
        .iter()
        .map(|m| {
            [
                m.machine.to_string(),
                way(m),
                m.phase.to_string(),
                state(m.state).to_string(),
                percent(m.permille),
                Rate::approx(m.rate),
                m.id.to_string(),
            ]
        })
        .collect();
    table(
        [
            "MACHINE",
            "WAY",
            "PHASE",
            "STATE",
            "DONE",
            "RATE",
            "MIGRATION",
        ],
        &rows,
    )
}

/// Where a machine goes, seen from this host.
pub fn way(m: &MigrationView) -> String {
    match m.direction {
        whimbrel_host::api::Direction::Outgoing => format!("to {}", m.peer),
        whimbrel_host::api::Direction::Incoming => format!("from {}", m.peer),
    }
}

pub fn migration(m: &MigrationView) -> String {
    let spaces: Vec<_> = m
        .spaces
        .iter()
        .map(|s| {
            let kind = match s.kind {
                SpaceKind::Disk => "disk",
                SpaceKind::Ram => "ram",
            };
            [
                s.name.clone(),
                kind.to_string(),
                s.units_total.to_string(),
                s.units_live.to_string(),
                s.units_resident.to_string(),
                s.units_sent.to_string(),
                bytes(s.bytes_sent),
            ]
        })
        .collect();
    let mut text = pairs(&[
        ("migration", format!("{} of {} {}", m.id, m.machine, way(m))),
        ("phase", m.phase.to_string()),
        ("state", state(m.state).to_string()),
        ("done", percent(m.permille)),
        ("time left", eta(m)),
        (
            "rate",
            match m.push_held_to {
                Some(held) => format!(
                    "{} of {}, push held to {} for the guest's I/O",
                    Rate::approx(m.rate),
                    m.bandwidth,
                    Rate::approx(held)
                ),
                None => format!("{} of {}", Rate::approx(m.rate), m.bandwidth),
            },
        ),
        (
            "sent",
            format!(
                "{} ({} on demand, {} pushed)",
                bytes(m.sent.total()),
                bytes(m.sent.demand),
                bytes(m.sent.push)
            ),
        ),
        ("content", content(m.sent, m.codecs, Some(m.compress))),
        ("deltas", deltas(m.deltas)),
        ("demands", demands(&m.demands)),
        ("blackout", m.blackout_ms.map_or(String::new(), millis)),
        (
            "link",
            format!("{}, {} reconnects", link(&m.link), m.link.reconnects),
        ),
        ("started", m.started.to_string()),
        ("ended", m.ended.map_or(String::new(), |e| e.to_string())),
        ("messages", m.messages.join("\n")),
        (
            "error",
            m.error.as_ref().map_or(String::new(), |e| e.what.clone()),
        ),
    ]);
    text.push_str("\n\n");
    text.push_str(&table(
        [
            "SPACE",
            "KIND",
            "UNITS",
            "LIVE",
            "RESIDENT",
            "SENT",
            "BYTES SENT",
        ],
        &spaces,
    ));
    if let Some(r) = &m.report {
        text.push_str("\n\n");
        text.push_str(&report(r));
    }
    text
}

/// What became of content on the link: `300 MiB compressed to 43 % (70000 units zstd, 10 plain, 9 zero)`.
fn content(sent: SentBytes, codecs: CodecUnits, wanted: Option<Compress>) -> String {
    let Some(share) = sent.over_content() else {
        return String::new();
    };
    let CodecUnits { plain, zstd, zero } = codecs;
    let wanted = wanted.map_or(String::new(), |wanted| format!("; compress {wanted}"));
    format!(
        "{} compressed to {:.0} % ({zstd} units zstd, {plain} plain, {zero} zero){wanted}",
        bytes(sent.content),
        100.0 * share,
    )
}

/// What deltas were good for: `700 units, 2.6 MiB saved (800 of 1000 sent again were kept, in 64.0 MiB)`.
fn deltas(d: DeltaStats) -> String {
    if d.again == 0 {
        return String::new();
    }
    format!(
        "{} units, {} saved ({} of {} sent again were kept, in {})",
        d.units,
        bytes(d.saved),
        d.hits,
        d.again,
        bytes(d.cache),
    )
}

pub fn report(r: &MigrationReport) -> String {
    let parts: Vec<String> = r
        .blackout_parts
        .iter()
        .map(|p| format!("{} {}", p.name, millis(p.ms)))
        .collect();
    let blackout = match (r.blackout_ms, parts.is_empty()) {
        (None, _) => String::new(),
        (Some(ms), true) => millis(ms),
        (Some(ms), false) => format!("{} ({})", millis(ms), parts.join(", ")),
    };
    let ratio = if r.units_live == 0 {
        0.0
    } else {
        r.units_sent as f64 / r.units_live as f64
    };
    pairs(&[
        ("time", format!("{:.1} s", r.total_ms / 1000.0)),
        ("blackout", blackout),
        (
            "drain",
            r.drain_ms
                .map_or(String::new(), |ms| format!("{:.1} s", ms / 1000.0)),
        ),
        (
            "sent",
            format!(
                "{}; {} units for {} live ones ({ratio:.3}), {} of them ahead of the switch in vain, {} several times",
                bytes(r.sent.total()),
                r.units_sent,
                r.units_live,
                r.units_outdated,
                r.units_repeated
            ),
        ),
        ("content", content(r.sent, r.codecs, None)),
        ("deltas", deltas(r.deltas)),
        ("demands", demands(&r.demands)),
        ("guest's I/O", guest_io(&r.guest_io)),
        (
            "without link",
            format!("{:.1} s, {} reconnects", r.outage_ms / 1000.0, r.reconnects),
        ),
        (
            "verified",
            if r.verified {
                "every extent's digest is equal"
            } else {
                "no"
            }
            .to_string(),
        ),
    ])
}

#[cfg(test)]
mod tests {
    use super::*;
    use whimbrel_host::api::EtaRange;
    use whimbrel_host::api::fake::{sample_machine, sample_migration, sample_volume};

    #[test]
    fn a_migration_shows_ram_and_disks_and_the_link() {
        let mut view = sample_migration();
        view.permille = 437;
        view.eta = Some(EtaRange {
            soonest_s: 60,
            latest_s: Some(90),
        });
        let text = migration(&view);
        for part in [
            "43.7 %",
            "1m to 1m 30s",
            "pc.ram",
            "root",
            "up 30 ms",
            "to b",
            "prepare",
        ] {
            assert!(text.contains(part), "{part} in {text}");
        }
    }

    #[test]
    fn compression_is_told_as_a_share_of_the_content() {
        let sent = SentBytes {
            demand: 10 << 20,
            push: 33 << 20,
            control: 5,
            content: 100 << 20,
        };
        let codecs = CodecUnits {
            plain: 3,
            zstd: 2,
            zero: 1,
        };
        assert_eq!(
            content(sent, codecs, Some(Compress::Auto)),
            "100.0 MiB compressed to 43 % (2 units zstd, 3 plain, 1 zero); compress auto"
        );
        assert_eq!(content(SentBytes::default(), codecs, None), "");
    }

    #[test]
    fn a_broken_link_says_what_it_waits_for() {
        let mut view = sample_migration().link;
        view.connected = false;
        view.waiting_for = Some("b refuses the connection".to_string());
        assert!(
            link(&view).starts_with("down ")
                && link(&view).ends_with("s: b refuses the connection")
        );
    }

    #[test]
    fn lists_have_a_line_each() {
        assert_eq!(volumes(&[sample_volume()]).lines().count(), 2);
        assert!(machines(&[sample_machine()]).contains("running"));
        assert!(machine(&sample_machine()).contains("root (1.0 GiB)"));
        assert!(volume(&sample_volume()).contains("1073741824 bytes"));
    }
}
