//! The command line.

mod report;

pub use report::Report;

use crate::snapshot::args::SnapshotCommand;
use crate::trace::args::TraceCommand;
use clap::{Args, Parser, Subcommand, ValueEnum};
use clap_complete::Shell;
use std::net::SocketAddr;
use std::path::PathBuf;
use whimbrel_host::api::{Compress, Delta, DiskMode, Format, ImageFormat, RamMode, RamOrder};
use whimbrel_host::state::{ByteSize, LatencyBound, Name, RateLimit};
use whimbrel_peer::invitation::InvitationId;
use whimbrel_peer::key_id::KeyId;
use whimbrel_peer::rights::Rights;
use whimbrel_peer::trust::{PeerAddress, PeerName};

/// Exit codes, shown with the help and in the manual page; [`crate::error::Exit`] is the same in code.
const EXIT_CODES: &str = "\
Exit codes:
  0  done
  1  failed
  2  the command line makes no sense
  3  the daemon cannot be reached
  4  the migration failed or was cancelled; the machine is at its source as before
  5  the machine is paused and needs the operator's decision";

/// Moves running virtual machines, RAM and disks, between hosts over any distance.
#[derive(Debug, Parser)]
#[command(name = "whimbrel", version, after_help = EXIT_CODES, max_term_width = 100)]
pub struct Cli {
    #[command(flatten)]
    pub global: Global,
    #[command(subcommand)]
    pub command: Command,
}

#[derive(Clone, Debug, Default, Args)]
pub struct Global {
    /// Answer in JSON; errors too, on standard error
    #[arg(long, global = true)]
    pub json: bool,
    /// State directory [default: as configured, else /var/lib/whimbrel]
    #[arg(long, global = true, value_name = "DIR")]
    pub state: Option<PathBuf>,
    /// Configuration file [default: /etc/whimbrel/whimbrel.toml if there is one]
    #[arg(long, global = true, value_name = "FILE")]
    pub config: Option<PathBuf>,
    /// The daemon's socket [default: as configured, else api.sock in the state directory]
    #[arg(long, global = true, value_name = "PATH")]
    pub socket: Option<PathBuf>,
}

#[derive(Debug, Subcommand)]
pub enum Command {
    /// This host: its identity, its daemon, the peers it trusts
    #[command(subcommand)]
    Host(HostCommand),
    /// Volumes: the disks of machines
    #[command(subcommand)]
    Volume(VolumeCommand),
    /// Machines: a QEMU and its volumes
    #[command(subcommand)]
    Machine(MachineCommand),
    /// Snapshots: incremental backups of machines' volumes
    #[command(subcommand)]
    Snapshot(SnapshotCommand),
    /// Move a running machine, RAM and disks, to another host
    Migrate(Migrate),
    /// Let a machine that is held in its copy switch to the other host now
    Switch {
        /// The machine
        machine: Name,
    },
    /// Show machines and migrations as they are now
    Status {
        /// Only this machine
        machine: Option<Name>,
    },
    /// Follow a migration until it is over
    Watch {
        /// The machine; may be left out if only one migrates
        machine: Option<Name>,
    },
    /// Show what a migration did over time, while it goes on or afterwards, at either end
    Report(Report),
    /// Give a migration up; the machine stays at its source
    Cancel {
        /// The machine
        machine: Name,
    },
    /// Show where a machine stands whose move does not go on, and take it back
    ///
    /// Without options nothing is changed: it shows what both sides are known to hold, what may be done, and what
    /// each choice gives up. Run it on the host that the machine left.
    Recover {
        /// The machine
        machine: Name,
        /// Have the machine back as it was at the switchover; what its guest did since is given up
        #[arg(long)]
        take_back: bool,
        /// The destination, if it cannot be reached and you are certain that the guest there does not run and
        /// never will; otherwise the machine runs twice
        #[arg(long, value_name = "HOST", requires = "take_back")]
        lost: Option<PeerName>,
    },
    /// Explain a state directory: what it holds, what is wrong with it, what a daemon would do with it
    ///
    /// Nothing is changed, and no daemon is needed. Exits with 1 if something is wrong.
    Fsck {
        /// The directory; the configured one if left out
        dir: Option<PathBuf>,
    },
    /// Change how much of the link a migration may use, from now on
    Throttle {
        /// The machine
        machine: Name,
        /// Such as 80Mbit or 10MiB/s; `unlimited` for no limit
        rate: RateLimit,
    },
    /// Traces of disks: what a guest asked of one, recorded here or by other tools, shown and replayed
    ///
    /// Only `record` asks the daemon; all else works on files.
    #[command(subcommand)]
    Trace(TraceCommand),
    /// Write a shell's completions to standard output
    Completions {
        /// The shell
        shell: Shell,
    },
    /// Write the manual pages into a directory
    Man {
        /// The directory; made if missing
        dir: PathBuf,
    },
}

#[derive(Debug, Subcommand)]
pub enum HostCommand {
    /// Make the state directory and the host's key, unless they exist
    Init {
        /// What this host calls itself [default: the system's host name]
        #[arg(long)]
        name: Option<PeerName>,
    },
    /// Run the daemon
    Run {
        /// Address that peers reach this host at [default: as configured, else 0.0.0.0:7420]
        #[arg(long, value_name = "ADDR:PORT")]
        listen: Option<SocketAddr>,
    },
    /// Show this host: its key, above all
    Show,
    /// Trust another host, from its next connection on
    Trust {
        /// What to call it here
        name: PeerName,
        /// The key that `whimbrel host show` prints there
        key: KeyId,
        /// Where it listens, as HOST:PORT; several are tried in order
        #[arg(required = true, value_name = "ADDR")]
        addresses: Vec<PeerAddress>,
        /// What it may do: send (machines to this host), receive (machines of this host), both with a comma
        /// between them, or nothing [default: both]
        #[arg(long, value_name = "RIGHTS", value_parser = rights)]
        may: Option<Rights>,
    },
    /// Invite another host: prints a token for `whimbrel host join` there, after which both trust each other
    Invite(Invite),
    /// Join the host that made an invitation: both trust each other then
    Join(Join),
    /// List the hosts that this one trusts
    Ls,
    /// Call a trusted host by another name
    Rename {
        /// What it is called here
        old: PeerName,
        /// What it is to be called
        new: PeerName,
    },
    /// Change what a trusted host may do, from its next migration on
    #[command(group = clap::ArgGroup::new("rights").required(true).multiple(true).args(["send", "receive"]))]
    Allow {
        /// What it is called here
        name: PeerName,
        /// Whether it may send machines to this host
        #[arg(long, value_enum, value_name = "yes|no")]
        send: Option<YesNo>,
        /// Whether it may receive machines from this host
        #[arg(long, value_enum, value_name = "yes|no")]
        receive: Option<YesNo>,
    },
    /// Trust another host no more; its connections are cut at once
    #[command(alias = "untrust")]
    Revoke {
        /// What it is called here
        name: PeerName,
        /// Even if a migration with it is under way, which is cut off
        #[arg(long)]
        force: bool,
    },
}

#[derive(Debug, Args)]
pub struct Invite {
    /// How long the token is good, such as 15m or 2h; a day at most
    #[arg(long, value_name = "TIME", default_value = "15m")]
    pub expires: humantime::Duration,
    /// What the host that joins is to be called here [default: what it calls itself]
    #[arg(long = "as", value_name = "NAME")]
    pub called: Option<PeerName>,
    /// Where that host reaches this one, as HOST:PORT; may be repeated [default: found out]
    #[arg(long = "address", value_name = "ADDR")]
    pub addresses: Vec<PeerAddress>,
    /// What that host may do here: send, receive, both with a comma between them, or nothing
    #[arg(long, value_name = "RIGHTS", default_value = "send,receive", value_parser = rights)]
    pub may: Rights,
    /// List the invitations instead
    #[arg(long, conflicts_with_all = ["expires", "called", "addresses", "may", "cancel"])]
    pub list: bool,
    /// Take an invitation back instead
    #[arg(long, value_name = "ID", conflicts_with_all = ["expires", "called", "addresses", "may"])]
    pub cancel: Option<InvitationId>,
}

#[derive(Debug, Args)]
pub struct Join {
    /// What `whimbrel host invite` printed; `-` reads it from standard input
    pub token: String,
    /// What the inviting host is to be called here [default: what it calls itself]
    #[arg(long = "as", value_name = "NAME")]
    pub called: Option<PeerName>,
    /// What this host wants to be called there [default: its name]
    #[arg(long, value_name = "NAME")]
    pub name: Option<PeerName>,
    /// Where the inviting host reaches this one, as HOST:PORT; may be repeated [default: found out]
    #[arg(long = "address", value_name = "ADDR")]
    pub addresses: Vec<PeerAddress>,
    /// What the inviting host may do here: send, receive, both with a comma between them, or nothing
    #[arg(long, value_name = "RIGHTS", default_value = "send,receive", value_parser = rights)]
    pub may: Rights,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum YesNo {
    Yes,
    No,
}

impl From<YesNo> for bool {
    fn from(said: YesNo) -> bool {
        said == YesNo::Yes
    }
}

fn rights(text: &str) -> Result<Rights, String> {
    let mut rights = Rights {
        send: false,
        receive: false,
    };
    if text == "nothing" {
        return Ok(rights);
    }
    for word in text.split(',') {
        match word {
            "send" => rights.send = true,
            "receive" => rights.receive = true,
            other => {
                return Err(format!(
                    "'{other}' is no right: there are send and receive, or nothing"
                ));
            }
        }
    }
    Ok(rights)
}

#[derive(Debug, Subcommand)]
pub enum VolumeCommand {
    /// Make an empty volume, or adopt a block device with what is on it
    Create {
        /// Its name
        name: Name,
        /// Such as 10GiB; may be left out for a device: all of it
        #[arg(long, required_unless_present = "device")]
        size: Option<ByteSize>,
        /// How it is stored
        #[arg(long, value_enum, default_value_t, conflicts_with = "device")]
        format: StoreArg,
        /// A block device to adopt in place
        #[arg(long, value_name = "PATH")]
        device: Option<PathBuf>,
        /// It waits for a volume of its name to arrive from another host, and is then overwritten
        #[arg(long)]
        awaits: bool,
    },
    /// Make a volume from an image or an NBD export; holes stay holes
    Import {
        /// The volume's name
        name: Name,
        /// A file, or nbd://HOST/EXPORT (with :PORT), or nbd+unix:///EXPORT?socket=PATH
        from: String,
        /// The file's format [default: by its name, else raw]
        #[arg(long, value_enum)]
        format: Option<FormatArg>,
        /// How the volume is stored
        #[arg(long, value_enum, default_value_t, conflicts_with = "device")]
        to: StoreArg,
        /// A block device to put it on, whose content is overwritten
        #[arg(long, value_name = "PATH")]
        device: Option<PathBuf>,
    },
    /// Write a volume's content to a new file; holes stay holes
    Export {
        /// The volume
        name: Name,
        /// The file; it must not exist
        file: PathBuf,
        /// The file's format
        #[arg(long, value_enum, default_value_t)]
        format: StoreArg,
    },
    /// Serve a volume over TCP as an NBD export, until this command is ended
    ///
    /// For tools on other computers; no machine may run on the volume meanwhile. With --tls only clients with a
    /// certificate of the folder's authority are let in. Without it, whoever reaches the port may read the volume:
    /// at 127.0.0.1 every user of this computer.
    Serve {
        /// The volume
        name: Name,
        /// Where clients connect: an address of this host, or 0.0.0.0, and a port
        #[arg(long, value_name = "ADDRESS:PORT", default_value = "127.0.0.1:10809")]
        tcp: SocketAddr,
        /// A folder with ca-cert.pem, server-cert.pem and server-key.pem; made, with a client's, if there is none
        #[arg(long, value_name = "DIR", conflicts_with = "plain_text")]
        tls: Option<PathBuf>,
        /// Without TLS beyond this computer: everybody on the way can read what passes, and change it
        #[arg(long)]
        plain_text: bool,
        /// Let clients write
        #[arg(long)]
        writable: bool,
    },
    /// Make another volume of the same content, sharing room where the file system can
    Clone {
        /// The volume
        name: Name,
        /// The new volume's name
        new: Name,
        /// How the new one is stored [default: as the old one]
        #[arg(long, value_enum)]
        format: Option<StoreArg>,
    },
    /// Change a volume's size; no machine may run on it
    Resize {
        /// The volume
        name: Name,
        /// Such as 10GiB
        size: ByteSize,
        /// Let its end be cut off, with whatever the guest has there
        #[arg(long)]
        shrink: bool,
    },
    /// Look a volume over: its record, its content, its journal
    Check {
        /// The volume
        name: Name,
        /// Put right what can be put right without losing anything
        #[arg(long)]
        repair: bool,
    },
    /// Show what of a volume is where: absent, present, written, hot
    Map {
        /// The volume
        name: Name,
        /// Into how many parts it is divided [default: 1024]
        #[arg(long, value_parser = clap::value_parser!(u32).range(1..=65_536))]
        cells: Option<u32>,
    },
    /// Show which parts of a volume its guest uses most
    Heat {
        /// The volume
        name: Name,
        /// How many parts
        #[arg(long, default_value_t = 20, value_parser = clap::value_parser!(u32).range(1..=65_536))]
        top: u32,
    },
    /// List the volumes
    Ls,
    /// Show a volume
    Show {
        /// Its name
        name: Name,
    },
    /// Remove a volume and its content; a device keeps what is on it
    Rm {
        /// Its name
        name: Name,
    },
}

#[derive(Debug, Subcommand)]
pub enum MachineCommand {
    /// Make a machine known from its description in TOML
    Define {
        /// The description
        file: PathBuf,
    },
    /// Start a machine
    Start {
        /// The machine
        name: Name,
    },
    /// Ask a machine's guest to shut down
    Stop {
        /// The machine
        name: Name,
        /// End its process at once instead, as if the power failed
        #[arg(long)]
        force: bool,
    },
    /// Let a guest go on that a disk's error paused; its requests are made again
    Resume {
        /// The machine
        name: Name,
    },
    /// Take over a QEMU that runs already
    Adopt {
        /// The description that fits it
        file: PathBuf,
        /// Its QMP socket
        #[arg(long, value_name = "SOCKET")]
        qmp: PathBuf,
    },
    /// List the machines
    Ls,
    /// Show a machine
    Show {
        /// The machine
        name: Name,
    },
    /// Forget a machine that does not run; its volumes stay
    Undefine {
        /// The machine
        name: Name,
    },
}

#[derive(Debug, Args)]
pub struct Migrate {
    /// The machine
    pub machine: Name,
    /// The host to move it to, as this one calls it
    #[arg(long, value_name = "HOST")]
    pub to: PeerName,
    /// Most of the link it may use, such as 80Mbit; can be changed later with `throttle`
    #[arg(long, value_name = "RATE", default_value = "unlimited")]
    pub bandwidth: RateLimit,
    /// What the guest's own I/O is to stay within (p99), such as 20ms: push yields beyond it; off: never. As the
    /// configuration has it by default, which is 100ms unless it says otherwise
    #[arg(long, value_name = "TIME")]
    pub guest_latency: Option<LatencyBound>,
    /// Copy, but switch only when told to with `switch`
    #[arg(long)]
    pub hold: bool,
    /// How RAM goes
    #[arg(long, value_enum, default_value_t)]
    pub ram: RamArg,
    /// How disks go
    #[arg(long, value_enum, default_value_t)]
    pub disks: DisksArg,
    /// How content is written: auto (whatever delivers most at the moment), none, zstd or zstd:LEVEL
    #[arg(long, value_name = "CODEC", default_value = "auto")]
    pub compress: Compress,
    /// Whether memory that goes again may go as what changed of it: on or off
    #[arg(long, value_name = "SWITCH", default_value = "on")]
    pub delta: Delta,
    /// With --ram precopy: cold-first (what the guest writes all the time goes once, in the end) or address
    #[arg(long, value_name = "ORDER", default_value = "cold-first")]
    pub ram_order: RamOrder,
    /// Return at once instead of showing progress until it is over
    #[arg(long)]
    pub detach: bool,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub enum RamArg {
    /// Hybrid where the destination can, else pre-copy
    #[default]
    Auto,
    /// What the guest only reads goes ahead of the switch, the rest after it: short blackout, and the guest
    /// is soon at full speed; always ends
    Hybrid,
    /// All of it after the switch: switches at once, short blackout, always ends
    Postcopy,
    /// All of it before the switch
    Precopy,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub enum DisksArg {
    /// What the guest does not write to goes ahead of the switch, the rest after it: the copy takes its time while
    /// the guest runs on undisturbed, and little is left that could be lost with a host; always ends
    Hybrid,
    /// All of it after the switch: switches at once
    #[default]
    Postcopy,
}

impl From<DisksArg> for DiskMode {
    fn from(arg: DisksArg) -> DiskMode {
        match arg {
            DisksArg::Hybrid => DiskMode::Hybrid,
            DisksArg::Postcopy => DiskMode::Postcopy,
        }
    }
}

impl From<RamArg> for RamMode {
    fn from(arg: RamArg) -> RamMode {
        match arg {
            RamArg::Auto => RamMode::Auto,
            RamArg::Hybrid => RamMode::Hybrid,
            RamArg::Postcopy => RamMode::Postcopy,
            RamArg::Precopy => RamMode::Precopy,
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum FormatArg {
    /// The disk's bytes as they are
    Raw,
    /// A qcow2 image, with its backing files
    Qcow2,
    /// A VMDK; any but flat ones by `qemu-img`
    Vmdk,
}

impl From<FormatArg> for ImageFormat {
    fn from(arg: FormatArg) -> ImageFormat {
        match arg {
            FormatArg::Raw => ImageFormat::Raw,
            FormatArg::Qcow2 => ImageFormat::Qcow2,
            FormatArg::Vmdk => ImageFormat::Vmdk,
        }
    }
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub enum StoreArg {
    /// A sparse file, the disk's bytes as they are
    #[default]
    Raw,
    /// A qcow2 image
    Qcow2,
}

impl From<StoreArg> for Format {
    fn from(arg: StoreArg) -> Format {
        match arg {
            StoreArg::Raw => Format::Raw,
            StoreArg::Qcow2 => Format::Qcow2,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;
    use proptest::prelude::*;

    fn parse(line: &str) -> Result<Cli, clap::Error> {
        Cli::try_parse_from(std::iter::once("whimbrel").chain(line.split_whitespace()))
    }

    fn refusal(line: &str) -> String {
        parse(line).unwrap_err().to_string()
    }

    #[test]
    fn the_command_line_is_well_formed() {
        Cli::command().debug_assert();
    }

    #[test]
    fn a_migration_has_defaults() {
        let Command::Migrate(m) = parse("migrate web1 --to b").unwrap().command else {
            panic!()
        };
        assert_eq!((m.machine.as_str(), m.to.as_str()), ("web1", "b"));
        assert_eq!(
            (m.bandwidth, m.hold, m.ram, m.detach),
            (RateLimit(None), false, RamArg::Auto, false)
        );
        assert_eq!((m.compress, m.delta), (Compress::Auto, Delta::On));
    }

    #[test]
    fn a_migration_can_be_told_everything() {
        let line = "migrate web1 --to b --bandwidth 80Mbit --guest-latency 20ms --hold --ram precopy \
                    --compress zstd:6 --delta off --ram-order address --detach --json";
        let cli = parse(line).unwrap();
        let Command::Migrate(m) = cli.command else {
            panic!()
        };
        assert_eq!(m.bandwidth.0.unwrap().bits_per_second(), 80_000_000);
        assert_eq!(m.guest_latency.unwrap().to_string(), "20ms");
        assert!(m.hold && m.detach && cli.global.json);
        assert_eq!(RamMode::from(m.ram), RamMode::Precopy);
        assert_eq!((m.compress, m.delta), (Compress::Level(6), Delta::Off));
        assert_eq!(m.ram_order, RamOrder::Address);
    }

    #[test]
    fn global_options_go_anywhere() {
        for line in [
            "--state /s volume ls",
            "volume --state /s ls",
            "volume ls --state /s",
        ] {
            assert_eq!(
                parse(line).unwrap().global.state,
                Some(PathBuf::from("/s")),
                "{line}"
            );
        }
    }

    #[test]
    fn every_command_of_the_manual_is_taken() {
        let key = format!("whk1-{}", "a".repeat(52));
        for line in [
            "host init",
            "host init --name a",
            "host run --listen 127.0.0.1:1 --config /c",
            "host show",
            &format!("host trust b {key} 192.0.2.1:7420"),
            &format!("host trust b {key} 192.0.2.1:7420 [2001:db8::1]:7420"),
            &format!("host trust b {key} 192.0.2.1:7420 --may send"),
            "host revoke b",
            "host revoke b --force",
            "host untrust b",
            "host rename b c",
            "host allow b --send no",
            "host allow b --send yes --receive no",
            "host invite",
            "host invite --expires 2h --as b --address h:1 --address [::1]:2 --may send",
            "host invite --list",
            "host invite --cancel 0123456789abcdef",
            "host join whi1-x",
            "host join - --as a --name b --address h:1 --may nothing",
            "host ls",
            "volume create root --size 10GiB",
            "volume create root --size 10GiB --format qcow2 --awaits",
            "volume create root --device /dev/sdb",
            "volume import root /i --format raw",
            "volume import root /i.qcow2 --to qcow2",
            "volume import root nbd://h/x --device /dev/sdb",
            "volume export root /o --format qcow2",
            "volume serve root",
            "volume serve root --tcp 0.0.0.0:10809 --tls /pki --writable",
            "volume serve root --tcp 192.0.2.1:1 --plain-text",
            "volume clone root new",
            "volume resize root 20GiB",
            "volume resize root 1GiB --shrink",
            "volume check root --repair",
            "volume map root --cells 100",
            "volume heat root --top 3",
            "volume ls",
            "volume show root",
            "volume rm root",
            "machine define m.toml",
            "machine start web1",
            "machine stop web1 --force",
            "machine adopt m.toml --qmp /q",
            "machine ls",
            "machine show web1",
            "machine undefine web1",
            "switch web1",
            "status",
            "status web1",
            "watch",
            "watch web1",
            "cancel web1",
            "throttle web1 10MiB/s",
            "throttle web1 unlimited",
            "completions bash",
            "man /tmp",
        ] {
            assert!(parse(line).is_ok(), "{line}: {}", refusal(line));
        }
    }

    #[test]
    fn bad_words_are_refused_with_the_reason() {
        for (line, reason) in [
            ("volume create Root --size 1GiB", "'R' at position 1"),
            ("volume create root --size big", "not a size"),
            ("volume create root", "--size"),
            ("throttle web1 80", "no unit"),
            ("throttle web1 0Mbit", "never finish"),
            ("migrate web1", "--to"),
            (
                "migrate web1 --to b --ram maybe",
                "auto, hybrid, postcopy, precopy",
            ),
            ("host trust b whk1-short b:1", "was it cut"),
            ("host trust b c d", "whk1-"),
            ("host allow b", "--send"),
            ("host allow b --send maybe", "yes, no"),
            ("host invite --may fly", "send and receive, or nothing"),
            ("host invite --expires soon", "expires"),
            ("host invite --cancel x", "16 of 0-9 and a-f"),
            ("host invite --list --as b", "cannot be used with"),
            (
                &format!("host trust b whk1-{} nowhere", "a".repeat(52)),
                "port",
            ),
            ("machine adopt m.toml", "--qmp"),
            ("fly web1", "unrecognized subcommand"),
        ] {
            let text = refusal(line);
            assert!(text.contains(reason), "{line}: {text}");
        }
    }

    #[test]
    fn the_help_tells_the_exit_codes() {
        let help = Cli::command().render_long_help().to_string();
        for code in 0..=5 {
            assert!(help.contains(&format!("\n  {code}  ")), "{help}");
        }
    }

    proptest! {
        #[test]
        fn no_line_makes_the_parser_panic(words in prop::collection::vec("(migrate|volume|create|host|trust|--to|--size|-[a-z]|\\PC{0,8})", 0..6)) {
            let _ = Cli::try_parse_from(std::iter::once("whimbrel".to_string()).chain(words));
        }
    }
}
