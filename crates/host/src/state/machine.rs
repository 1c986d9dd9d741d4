//! What a machine is (`machine.toml`, its owner's words) and what it does now (`runtime.toml`).

use super::hardware::{Bus, MemoryBacking};
use super::name::Name;
use super::quantity::ByteSize;
use super::timestamp::Timestamp;
use super::toml_text::{self, TomlError};
use super::volume::Ownership;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::fmt;
use std::io;
use std::path::{Path, PathBuf};
use whimbrel_engine::switchover::Epoch;

/// Most disks, and most network cards, that a machine may have; one PCI bus holds both.
pub const MAX_DEVICES: usize = 14;

/// Most virtual processors.
pub const MAX_VCPUS: u32 = 1024;

/// Arguments the daemon gives QEMU itself; given twice they would fight.
const OWN_ARGS: [&str; 13] = [
    "-S",
    "-accel",
    "-cpu",
    "-daemonize",
    "-incoming",
    "-loadvm",
    "-m",
    "-machine",
    "-name",
    "-pidfile",
    "-qmp",
    "-smp",
    "-snapshot",
];

#[derive(Debug, thiserror::Error)]
pub enum SpecError {
    #[error("cannot read {}: {source}", path.display())]
    Read { path: PathBuf, source: io::Error },
    #[error(transparent)]
    Syntax(#[from] TomlError),
    #[error("{field}: {problem}")]
    Invalid { field: String, problem: String },
}

impl SpecError {
    pub fn next_step(&self) -> &'static str {
        match self {
            SpecError::Read { .. } => "name a readable file that describes the machine in TOML",
            SpecError::Syntax(_) => "correct that line and define the machine again",
            SpecError::Invalid { .. } => "correct the description and define the machine again",
        }
    }
}

/// A machine as its owner describes it.
///
/// ```toml
/// name = "web1"
/// memory = "512MiB"
/// vcpus = 2
///
/// [[disk]]
/// volume = "web1-root"
///
/// [[nic]]
/// network = "lan"
/// ```
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MachineSpec {
    pub name: Name,
    pub memory: ByteSize,
    #[serde(default, skip_serializing_if = "MemoryBacking::is_default")]
    pub memory_backing: MemoryBacking,
    #[serde(default = "one")]
    pub vcpus: u32,
    /// QEMU's machine type. An alias (`q35`) is resolved to the concrete version when the machine starts.
    #[serde(default = "q35")]
    pub machine_type: String,
    /// QEMU's CPU model with its flags. Absent: the one that fits `accel`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cpu: Option<String>,
    #[serde(default)]
    pub accel: Accel,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub kernel: Option<PathBuf>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub initrd: Option<PathBuf>,
    /// The kernel's command line.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub append: Option<String>,
    /// A firmware image in place of QEMU's own; with a disk in flash it is flash too.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub firmware: Option<PathBuf>,
    /// Further arguments for QEMU, as they are.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub extra_args: Vec<String>,
    #[serde(default, skip_serializing_if = "OnDiskError::is_default")]
    pub on_disk_error: OnDiskError,
    #[serde(default, rename = "disk", skip_serializing_if = "Vec::is_empty")]
    pub disks: Vec<DiskSpec>,
    #[serde(default, rename = "nic", skip_serializing_if = "Vec::is_empty")]
    pub nics: Vec<NicSpec>,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DiskSpec {
    pub volume: Name,
    #[serde(default, skip_serializing_if = "Bus::is_default")]
    pub bus: Bus,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct NicSpec {
    /// A network of the host's configuration; every host maps the name to a bridge of its own.
    pub network: Name,
    /// Absent: made from the machine's name when it is defined, so that it stays the same everywhere.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mac: Option<Mac>,
}

/// How QEMU runs the guest's processors.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Accel {
    /// KVM where the host has it, else TCG.
    #[default]
    Auto,
    Kvm,
    Tcg,
}

/// What happens to a guest whose disk fails a request: no room, an I/O error underneath, or a daemon that
/// was away for longer than requests are held.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum OnDiskError {
    /// It is paused, and its request is made again when it is resumed: it sees no error.
    #[default]
    Stop,
    /// It is paused if room is lacking, and told of everything else.
    Enospc,
    /// It is told.
    Report,
}

impl OnDiskError {
    fn is_default(&self) -> bool {
        *self == OnDiskError::default()
    }
}

/// A network card's address.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Mac(pub [u8; 6]);

#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum MacError {
    #[error(
        "`{text}` is not a MAC address (six pairs of hexadecimal digits, like 52:54:00:12:34:56)"
    )]
    NotAMac { text: String },
    #[error(
        "`{text}` is a multicast address (its first byte is odd); a network card needs its own"
    )]
    Multicast { text: String },
}

impl TryFrom<String> for Mac {
    type Error = MacError;

    fn try_from(text: String) -> Result<Mac, MacError> {
        let mut mac = [0; 6];
        let mut parts = text.split(':');
        let good = mac.iter_mut().all(|byte| {
            let part = parts
                .next()
                .filter(|p| p.len() == 2 && p.bytes().all(|b| b.is_ascii_hexdigit()));
            part.and_then(|p| u8::from_str_radix(p, 16).ok())
                .map(|b| *byte = b)
                .is_some()
        });
        if !good || parts.next().is_some() {
            return Err(MacError::NotAMac { text });
        }
        if mac[0] & 1 == 1 {
            return Err(MacError::Multicast { text });
        }
        Ok(Mac(mac))
    }
}

impl From<Mac> for String {
    fn from(mac: Mac) -> String {
        mac.to_string()
    }
}

impl fmt::Display for Mac {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [a, b, c, d, e, g] = self.0;
        write!(f, "{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{g:02x}")
    }
}

fn one() -> u32 {
    1
}

fn q35() -> String {
    "q35".to_string()
}

impl MachineSpec {
    /// Reads and checks a description. Relative paths in it count from the file's folder, and are made
    /// absolute here, since the daemon works elsewhere.
    pub fn read(file: &Path) -> Result<MachineSpec, SpecError> {
        let failed = |source| SpecError::Read {
            path: file.to_path_buf(),
            source,
        };
        let text = std::fs::read_to_string(file).map_err(failed)?;
        let mut spec: MachineSpec = toml_text::parse(file, &text)?;
        let absolute = std::path::absolute(file).map_err(failed)?;
        if let Some(folder) = absolute.parent() {
            for path in [&mut spec.kernel, &mut spec.initrd, &mut spec.firmware] {
                *path = path.take().map(|p| folder.join(p));
            }
        }
        spec.check()?;
        Ok(spec)
    }

    /// What a description can be wrong about by itself. Whether its volumes and networks exist is the
    /// daemon's to say.
    pub fn check(&self) -> Result<(), SpecError> {
        let invalid = |field: &str, problem: String| {
            Err(SpecError::Invalid {
                field: field.to_string(),
                problem,
            })
        };
        if self.memory.0 < ByteSize::MIB || !self.memory.0.is_multiple_of(ByteSize::MIB) {
            return invalid(
                "memory",
                format!("{} is not a whole number of MiB above zero", self.memory),
            );
        }
        if self.vcpus == 0 || self.vcpus > MAX_VCPUS {
            return invalid(
                "vcpus",
                format!("{} is not between 1 and {MAX_VCPUS}", self.vcpus),
            );
        }
        if !is_word(&self.machine_type) {
            return invalid(
                "machine_type",
                format!("`{}` is not the name of a machine type", self.machine_type),
            );
        }
        if self
            .cpu
            .as_ref()
            .is_some_and(|cpu| cpu.is_empty() || cpu.contains(char::is_whitespace))
        {
            return invalid(
                "cpu",
                "a CPU model has no spaces and is not empty".to_string(),
            );
        }
        for (field, set) in [
            ("initrd", self.initrd.is_some()),
            ("append", self.append.is_some()),
        ] {
            if set && self.kernel.is_none() {
                return invalid(field, "it has no meaning without `kernel`".to_string());
            }
        }
        for (field, path) in [
            ("kernel", &self.kernel),
            ("initrd", &self.initrd),
            ("firmware", &self.firmware),
        ] {
            if let Some(path) = path.as_ref().filter(|p| !p.is_absolute()) {
                return invalid(field, format!("{} is not an absolute path", path.display()));
            }
        }
        if let Some(arg) = self.extra_args.iter().find(|a| is_own_argument(a)) {
            return invalid(
                "extra_args",
                format!("the daemon gives QEMU `{arg}` itself"),
            );
        }
        self.check_devices()
    }

    fn check_devices(&self) -> Result<(), SpecError> {
        let invalid = |field: String, problem: String| Err(SpecError::Invalid { field, problem });
        for (what, count) in [("disk", self.disks.len()), ("nic", self.nics.len())] {
            if count > MAX_DEVICES {
                return invalid(
                    format!("[[{what}]]"),
                    format!("{count} are more than the {MAX_DEVICES} a machine can have"),
                );
            }
        }
        let mut volumes = BTreeMap::new();
        for (i, disk) in self.disks.iter().enumerate() {
            if let Some(first) = volumes.insert(&disk.volume, i) {
                return invalid(
                    format!("[[disk]] {}", i + 1),
                    format!("volume `{}` is already disk {}", disk.volume, first + 1),
                );
            }
        }
        let disks = self.disks.iter().enumerate();
        let mut flash = disks.filter(|(_, disk)| disk.bus == Bus::Flash);
        if let Some((i, _)) = flash.next()
            && self.firmware.is_none()
        {
            return invalid(
                format!("[[disk]] {}", i + 1),
                "flash holds the variables of a UEFI firmware, and no `firmware` is given"
                    .to_string(),
            );
        }
        if let Some((i, _)) = flash.next() {
            return invalid(
                format!("[[disk]] {}", i + 1),
                "a machine has one disk in flash at most".to_string(),
            );
        }
        if let Some(arg) = self.extra_args.iter().find(|a| backs_memory(a))
            && !self.memory_backing.is_default()
        {
            return invalid(
                "memory_backing".to_string(),
                format!("`{arg}` in `extra_args` gives the memory another backing"),
            );
        }
        let mut macs = BTreeMap::new();
        for (i, mac) in self
            .nics
            .iter()
            .enumerate()
            .filter_map(|(i, n)| Some((i, n.mac?)))
        {
            if let Some(first) = macs.insert(mac, i) {
                return invalid(
                    format!("[[nic]] {}", i + 1),
                    format!("{mac} is already the address of card {}", first + 1),
                );
            }
        }
        Ok(())
    }

    /// Gives every card without an address one that depends on the machine's name and the card's
    /// position alone (locally administered, QEMU's 52:54:00 prefix).
    pub fn fill_macs(&mut self) {
        let mut used: Vec<Mac> = self.nics.iter().filter_map(|n| n.mac).collect();
        for (i, nic) in self
            .nics
            .iter_mut()
            .enumerate()
            .filter(|(_, n)| n.mac.is_none())
        {
            // At most MAX_DEVICES addresses are used, so one of as many tries and one more is free.
            let free = (0..=MAX_DEVICES as u32).find_map(|round| {
                let hash = blake3::hash(format!("{}/{i}/{round}", self.name).as_bytes());
                let [a, b, c] = [hash.as_bytes()[0], hash.as_bytes()[1], hash.as_bytes()[2]];
                let mac = Mac([0x52, 0x54, 0x00, a, b, c]);
                (!used.contains(&mac)).then_some(mac)
            });
            nic.mac = free;
            used.extend(free);
        }
    }
}

fn is_word(text: &str) -> bool {
    !text.is_empty()
        && text
            .chars()
            .all(|c| c.is_ascii_alphanumeric() || matches!(c, '.' | '_' | '-' | '+'))
}

/// Whether nodes bring memory of their own.
fn backs_memory(arg: &str) -> bool {
    arg.starts_with("node,") && arg.contains("memdev=")
}

/// QEMU takes `--m` for `-m`.
fn is_own_argument(arg: &str) -> bool {
    let bare = arg.strip_prefix("--").map(|a| format!("-{a}"));
    OWN_ARGS.contains(&bare.as_deref().unwrap_or(arg))
}

/// `machines/<name>/runtime.toml`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MachineRuntime {
    /// Fencing number of the machine's ownership; it only grows, and outlives every process.
    pub epoch: Epoch,
    pub ownership: Ownership,
    /// The QEMU, while there is one. It may have died since: see [`QemuProcess::is_alive`].
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub process: Option<QemuProcess>,
}

impl MachineRuntime {
    /// A machine of this host that never ran.
    pub fn fresh() -> MachineRuntime {
        MachineRuntime {
            epoch: Epoch(1),
            ownership: Ownership::Local,
            process: None,
        }
    }
}

/// A QEMU that outlives the daemon.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct QemuProcess {
    pub pid: u32,
    /// When the kernel started it, in clock ticks since boot: a pid is used again, this pair is not.
    pub start_ticks: u64,
    /// Its QMP socket.
    pub qmp: PathBuf,
    /// The concrete machine type (`pc-q35-10.0`), which the destination must be given.
    pub machine_type: String,
    /// Started by someone else and taken over with `machine adopt`.
    #[serde(default)]
    pub adopted: bool,
    pub started: Timestamp,
}

impl QemuProcess {
    /// Whether this very process still runs (a zombie does not).
    pub fn is_alive(&self) -> bool {
        start_ticks(self.pid) == Some(self.start_ticks)
    }
}

/// When the kernel started the process, in clock ticks since boot; `None` if it is gone or a zombie.
pub fn start_ticks(pid: u32) -> Option<u64> {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The command's name, in parentheses, may itself hold anything; the fields follow the last one.
    let mut fields = stat.rsplit_once(')')?.1.split_ascii_whitespace();
    let state = fields.next()?;
    if matches!(state, "Z" | "X") {
        return None;
    }
    // proc(5): the state is field 3, the start time field 22.
    fields.nth(18)?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn spec(text: &str) -> Result<MachineSpec, SpecError> {
        let spec: MachineSpec = toml_text::parse(Path::new("m.toml"), text)?;
        spec.check()?;
        Ok(spec)
    }

    fn error(text: &str) -> String {
        spec(text).unwrap_err().to_string()
    }

    const SMALL: &str = "name = \"web1\"\nmemory = \"512MiB\"\n";

    #[test]
    fn a_small_description_has_defaults() {
        let spec = spec(SMALL).unwrap();
        assert_eq!(
            (spec.memory.0, spec.vcpus, spec.accel),
            (512 << 20, 1, Accel::Auto)
        );
        assert_eq!(spec.machine_type, "q35");
    }

    #[test]
    fn an_unknown_key_is_named_with_its_line() {
        let text = error(&format!("{SMALL}memroy = 3\n"));
        assert!(
            text.starts_with("m.toml:3: `memroy`: unknown field"),
            "{text}"
        );
        let text = error(&format!("{SMALL}[[disk]]\nvolume = \"a\"\ncahce = 1\n"));
        assert!(text.starts_with("m.toml:5: `cahce`"), "{text}");
    }

    #[test]
    fn a_bad_size_is_named_with_its_line() {
        let text = error("name = \"web1\"\nmemory = \"lots\"\n");
        assert!(
            text.starts_with("m.toml:2: `memory`: `lots` is not a size"),
            "{text}"
        );
        assert!(error("name = \"a\"\nmemory = 1000\n").contains("whole number of MiB"));
    }

    #[test]
    fn one_volume_cannot_be_two_disks() {
        let text = error(&format!(
            "{SMALL}[[disk]]\nvolume = \"a\"\n[[disk]]\nvolume = \"a\"\n"
        ));
        assert_eq!(text, "[[disk]] 2: volume `a` is already disk 1");
    }

    #[test]
    fn flash_needs_a_firmware_and_is_one() {
        let flash = "[[disk]]\nvolume = \"VOL\"\nbus = \"flash\"\n";
        let (a, b) = (flash.replace("VOL", "a"), flash.replace("VOL", "b"));
        let text = error(&format!("{SMALL}{a}"));
        assert!(
            text.starts_with("[[disk]] 1: ") && text.contains("`firmware`"),
            "{text}"
        );
        let firmware = "firmware = \"/OVMF_CODE.fd\"\n";
        assert!(spec(&format!("{SMALL}{firmware}{a}")).is_ok());
        let text = error(&format!("{SMALL}{firmware}{a}{b}"));
        assert!(text.starts_with("[[disk]] 2: "), "{text}");
    }

    #[test]
    fn what_is_not_chosen_is_not_written_down() {
        let disk = "[[disk]]\nvolume = \"a\"\n";
        let written = toml::to_string(&spec(&format!("{SMALL}{disk}")).unwrap()).unwrap();
        assert!(
            !written.contains("bus") && !written.contains("backing"),
            "{written}"
        );
        let chosen = format!("{SMALL}memory_backing = \"huge\"\n{disk}bus = \"virtio-scsi\"\n");
        let chosen = spec(&chosen).unwrap();
        assert_eq!(chosen.memory_backing, MemoryBacking::Huge);
        assert_eq!(chosen.disks[0].bus, Bus::VirtioScsi);
    }

    #[test]
    fn memory_has_one_backing() {
        let nodes = "extra_args = [\"-numa\", \"node,memdev=m0\"]\n";
        assert!(spec(&format!("{SMALL}{nodes}")).is_ok());
        let text = error(&format!("{SMALL}memory_backing = \"shared\"\n{nodes}"));
        assert!(text.starts_with("memory_backing: "), "{text}");
    }

    #[test]
    fn two_cards_cannot_share_an_address() {
        let nic = "[[nic]]\nnetwork = \"lan\"\nmac = \"52:54:00:00:00:01\"\n";
        let text = error(&format!("{SMALL}{nic}{nic}"));
        assert!(text.contains("already the address of card 1"), "{text}");
        let text = error(&format!("{SMALL}{}", nic.replace("52:", "53:")));
        assert!(
            text.contains("m.toml:5: `mac`") && text.contains("multicast"),
            "{text}"
        );
    }

    #[test]
    fn an_initrd_needs_a_kernel() {
        assert!(error(&format!("{SMALL}initrd = \"/i\"\n")).starts_with("initrd: "));
    }

    #[test]
    fn the_daemons_own_arguments_are_refused() {
        for arg in ["-incoming", "--incoming", "-m"] {
            let text = error(&format!(
                "{SMALL}extra_args = [\"-vga\", \"none\", \"{arg}\"]\n"
            ));
            assert!(
                text.starts_with("extra_args: ") && text.contains(arg),
                "{text}"
            );
        }
        assert!(spec(&format!("{SMALL}extra_args = [\"-vga\", \"none\"]\n")).is_ok());
    }

    #[test]
    fn missing_addresses_are_made_and_stay_the_same() {
        let text = format!("{SMALL}[[nic]]\nnetwork = \"lan\"\n[[nic]]\nnetwork = \"lan\"\n");
        let (mut a, mut b) = (spec(&text).unwrap(), spec(&text).unwrap());
        a.fill_macs();
        b.fill_macs();
        assert_eq!(a, b);
        assert!(a.nics.iter().all(|n| n.mac.is_some()));
        assert!(a.check().is_ok());
    }

    #[test]
    fn relative_paths_count_from_the_descriptions_folder() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("m.toml");
        std::fs::write(&file, format!("{SMALL}kernel = \"boot/vmlinuz\"\n")).unwrap();
        let spec = MachineSpec::read(&file).unwrap();
        assert_eq!(spec.kernel.unwrap(), dir.path().join("boot/vmlinuz"));
    }

    #[test]
    fn a_process_is_told_from_a_later_one_of_the_same_pid() {
        let pid = std::process::id();
        let mut process = QemuProcess {
            pid,
            start_ticks: start_ticks(pid).unwrap(),
            qmp: PathBuf::from("/q"),
            machine_type: "pc-q35-10.0".to_string(),
            adopted: false,
            started: Timestamp::now(),
        };
        assert!(process.is_alive());
        process.start_ticks -= 1;
        assert!(!process.is_alive());
    }

    proptest! {
        #[test]
        fn every_mac_reads_back_as_written(bytes: [u8; 6]) {
            let mac = Mac(bytes);
            prop_assert_eq!(Mac::try_from(mac.to_string()).is_ok(), bytes[0] & 1 == 0);
        }

        #[test]
        fn no_description_makes_the_reader_panic(text in "(name|memory|=|\"|web|\\[\\[disk\\]\\]|volume|\n|[0-9]){0,30}") {
            let _ = spec(&text);
        }
    }
}
