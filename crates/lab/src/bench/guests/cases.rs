//! The machines, and what happens to them.

use super::memory::firmware;
use std::path::Path;
use whimbrel_lab::pair::{GuestSpec, Monitor};

pub const NAME: &str = "guest";

/// What happens during the first move.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum During {
    Nothing,
    /// The balloon holds half of the memory before; while it moves it grows, and shrinks in the drain.
    Balloon,
    /// Reset by its operator while RAM is being copied.
    ResetInCopy,
    /// Reset when it runs at the destination and most of it is at the source.
    ResetInDrain,
    /// It shuts itself down then.
    PowerOffInDrain,
    /// It shuts itself down before anything switched.
    PowerOffInCopy,
    /// Stopped by its operator before the move: it is to arrive so.
    Paused,
    /// Stopped by its operator while RAM is being copied.
    PausedInCopy,
}

/// What has to be had for a case.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Need {
    HugePages {
        mib: u64,
    },
    /// It cannot be run here, and why.
    Never(&'static str),
}

#[derive(Clone, Debug)]
pub struct Case {
    pub name: String,
    pub what: &'static str,
    pub spec: GuestSpec,
    pub during: During,
    pub needs: Vec<Need>,
    /// Further words for `migrate`.
    pub options: Vec<String>,
    /// A word of the refusal, for a machine that must not be moved.
    pub refused: Option<&'static str>,
    /// What a second small volume is made of; none without it.
    pub more_volume: Option<std::path::PathBuf>,
}

impl Case {
    fn of(name: &str, what: &'static str) -> Case {
        let mut spec = GuestSpec::small(NAME);
        spec.extra_args = Monitor::args();
        Case {
            refused: None,
            name: name.to_owned(),
            what,
            spec,
            during: During::Nothing,
            needs: Vec::new(),
            options: Vec::new(),
            more_volume: None,
        }
    }

    fn with(mut self, change: impl FnOnce(&mut GuestSpec)) -> Case {
        change(&mut self.spec);
        self
    }

    fn args(self, args: &[&str]) -> Case {
        self.with(|spec| {
            let args = args.iter().map(|arg| (*arg).to_owned());
            spec.extra_args.extend(args);
        })
    }

    fn during(self, during: During) -> Case {
        Case { during, ..self }
    }

    fn needs(mut self, need: Need) -> Case {
        self.needs.push(need);
        self
    }

    /// Without KVM; with it, this is to be moved and the case to be changed.
    fn refused_with(self, word: &'static str) -> Case {
        Case {
            refused: Some(word),
            ..self
        }
    }

    /// Once by each way for RAM.
    fn by_each(self) -> Vec<Case> {
        let way = |ram: &str| Case {
            name: format!("{}/{ram}", self.name),
            options: vec!["--ram".to_owned(), ram.to_owned()],
            ..self.clone()
        };
        ["hybrid", "postcopy", "precopy"].map(way).into()
    }

    fn precopy(self) -> Case {
        Case {
            options: vec!["--ram".to_owned(), "precopy".to_owned()],
            ..self
        }
    }
}

/// What is backed by an object of its own, in two nodes.
const NUMA: [&str; 10] = [
    "-object",
    "memory-backend-ram,id=m0,size=64M",
    "-object",
    "memory-backend-ram,id=m1,size=128M",
    "-numa",
    "node,nodeid=0,cpus=0,memdev=m0",
    "-numa",
    "node,nodeid=1,cpus=1,memdev=m1",
    "-numa",
    "dist,src=0,dst=1,val=20",
];

pub fn all() -> Vec<Case> {
    let mut cases = vec![
        Case::of("1-vcpu", "q35, 192 MiB, virtio-blk, one card"),
        Case::of("4-vcpus", "four processors").with(|s| s.vcpus = 4),
        Case::of("i440fx", "machine type pc, 2 processors").with(|s| {
            s.machine_type = Some("pc".to_owned());
            s.vcpus = 2;
        }),
        Case::of(
            "small-memory",
            "128 MiB, hardly more than this kernel boots in",
        )
        .with(|s| {
            s.memory_mib = 128;
            s.params.ram.hot_mib = 8;
            s.params.ram.region_mib = 8;
        }),
        Case::of("above-4-gib", "5 GiB: memory on both sides of the hole").with(|s| {
            s.memory_mib = 5120;
            // Linux hands out high memory first.
            s.params.ram.hot_mib = 64;
            s.params.ram.region_mib = 64;
        }),
        Case::of("two-nics", "two network cards").with(|s| s.more_nics = 1),
        Case::of("scsi", "its disk on a virtio-scsi controller").with(|s| {
            s.bus = Some("virtio-scsi".to_owned());
            s.params.disk = "/dev/sda".to_owned();
        }),
        Case::of("ide", "machine type pc, its disk on the chipset's IDE").with(|s| {
            s.machine_type = Some("pc".to_owned());
            s.bus = Some("ide".to_owned());
            s.params.disk = "/dev/sda".to_owned();
        }),
        Case::of("vga", "a VGA card: vga.vram is a second large RAM block")
            .args(&["-device", "VGA"]),
        Case::of("usb-rng", "virtio-rng, a USB controller with a tablet").args(&[
            "-device",
            "virtio-rng-pci",
            "-device",
            "qemu-xhci",
            "-device",
            "usb-tablet",
        ]),
    ];
    cases.push(cdrom());
    cases.push(uefi());
    cases.extend(
        Case::of(
            "balloon",
            "virtio-balloon, inflated before and while it moves",
        )
        .with(|s| s.memory_mib = 512)
        .args(&["-device", "virtio-balloon-pci,id=balloon0"])
        .during(During::Balloon)
        .by_each(),
    );
    cases.push(
        Case::of("free-page-hint", "virtio-balloon that hints at free pages and reports them")
            .with(|s| s.memory_mib = 512)
            .args(&[
                "-object",
                "iothread,id=hints",
                "-device",
                "virtio-balloon-pci,id=balloon0,free-page-hint=on,free-page-reporting=on,iothread=hints",
            ])
            .during(During::Balloon),
    );
    cases.extend(
        Case::of(
            "numa",
            "two NUMA nodes of unequal size, each a RAM block of its own",
        )
        .with(|s| s.vcpus = 2)
        .args(&NUMA)
        .refused_with("2 parts")
        .by_each(),
    );
    cases.extend(
        Case::of("memfd", "memory in a memfd, shared")
            .with(|s| s.lines.push("memory_backing = \"shared\"".to_owned()))
            .by_each(),
    );
    cases.extend(
        Case::of("huge-pages", "memory in huge pages of 2 MiB")
            .with(|s| s.lines.push("memory_backing = \"huge\"".to_owned()))
            .needs(Need::HugePages { mib: 2 * 192 })
            .by_each(),
    );
    for during in [During::ResetInCopy, During::ResetInDrain] {
        let name = match during {
            During::ResetInCopy => "reset-in-copy",
            _ => "reset-in-drain",
        };
        cases.extend(
            Case::of(name, "reset by its operator while it moves")
                .with(|s| s.reboots = true)
                .during(during)
                .by_each(),
        );
    }
    cases.push(
        Case::of(
            "poweroff-in-drain",
            "it shuts itself down while its disks arrive",
        )
        .during(During::PowerOffInDrain),
    );
    cases.push(
        Case::of("poweroff-in-copy", "it shuts itself down before the switch")
            .during(During::PowerOffInCopy),
    );
    let paused = Case::of("paused", "stopped by its operator: it is to arrive so");
    cases.extend(paused.during(During::Paused).by_each());
    cases.push(
        Case::of(
            "paused-in-copy",
            "stopped by its operator while RAM is copied",
        )
        .during(During::PausedInCopy),
    );
    cases.push(
        Case::of("precopy-4-vcpus", "four processors, by pre-copy")
            .with(|s| s.vcpus = 4)
            .precopy(),
    );
    cases
}

fn cdrom() -> Case {
    let mut case = Case::of(
        "cd-rom",
        "a CD-ROM drive with an image that both hosts have",
    );
    // Any file will do for a disc that nobody mounts.
    case = case.args(&[
        "-drive",
        "if=none,id=cd0,media=cdrom,readonly=on,format=raw,file=/usr/share/seabios/bios-256k.bin",
        "-device",
        "ide-cd,drive=cd0",
    ]);
    if !Path::new("/usr/share/seabios/bios-256k.bin").is_file() {
        case = case.needs(Need::Never("there is no file for its disc here"));
    }
    case
}

fn uefi() -> Case {
    let case = Case::of(
        "uefi",
        "UEFI in flash, its variables in a volume that moves along",
    );
    let Some((code, vars)) = firmware() else {
        return case.needs(Need::Never("no UEFI firmware (OVMF) is installed here"));
    };
    let mut case = case.with(|s| {
        s.memory_mib = 256;
        s.lines.push(format!("firmware = {code:?}"));
        s.flash = Some("vars".to_owned());
    });
    case.more_volume = Some(vars);
    case
}
