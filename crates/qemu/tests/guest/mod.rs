//! A guest for tests: Debian's cloud kernel, busybox, and a program that checks its own memory.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;
use std::time::{Duration, Instant};

use whimbrel_qemu::launch::{Kernel, LaunchSpec, Launched, Memory};
use whimbrel_qemu::qmp::Qmp;

/// Modules of the kernel, each after those it needs.
const MODULES: [&str; 9] = [
    "drivers/virtio/virtio_ring",
    "drivers/virtio/virtio",
    "drivers/virtio/virtio_pci_modern_dev",
    "drivers/virtio/virtio_pci_legacy_dev",
    "drivers/virtio/virtio_pci",
    "drivers/block/virtio_blk",
    "net/core/failover",
    "drivers/net/net_failover",
    "drivers/net/virtio_net",
];

/// How the guest's program behaves.
#[derive(Clone, Copy)]
pub struct Load {
    pub mib: u64,
    /// Microseconds between two pages.
    pub pause_us: u64,
}

pub const BUSY: Load = Load {
    mib: 48,
    pause_us: 0,
};
pub const IDLE: Load = Load {
    mib: 16,
    pause_us: 50_000,
};

/// `X/boot/vmlinuz-RELEASE`, whose modules are in `X/lib/modules/RELEASE`: the one that `WHIMBREL_KERNEL`
/// names, else the last of those installed.
fn kernel() -> PathBuf {
    if let Some(image) = std::env::var_os("WHIMBREL_KERNEL") {
        return image.into();
    }
    let mut found: Vec<PathBuf> = std::fs::read_dir("/boot")
        .expect("/boot")
        .map(|e| e.expect("/boot").path())
        .filter(|p| p.to_string_lossy().contains("/vmlinuz-"))
        .collect();
    found.sort();
    found.pop().expect("a kernel in /boot")
}

fn run(command: &mut Command) {
    let status = command.status().expect("started");
    assert!(status.success(), "{command:?}: {status}");
}

/// Where the kernel's own modules are.
fn modules() -> PathBuf {
    let image = kernel();
    let name = image.file_name().and_then(|name| name.to_str());
    let release = name.and_then(|name| name.strip_prefix("vmlinuz-"));
    let root = image.parent().and_then(Path::parent);
    let (release, root) = release.zip(root).expect("X/boot/vmlinuz-RELEASE");
    root.join("lib/modules").join(release).join("kernel")
}

/// Copies a module, decompressed where it is not. False if there is none: it is built in then.
fn copy_module(from: &Path, to: &Path) -> bool {
    let (plain, packed) = (from.with_extension("ko"), from.with_extension("ko.xz"));
    if plain.exists() {
        std::fs::copy(plain, to).expect("module");
    } else if packed.exists() {
        let to = std::fs::File::create(to).expect("module");
        run(Command::new("busybox")
            .args(["unxz", "-c"])
            .arg(packed)
            .stdout(to));
    } else {
        return false;
    }
    true
}

/// The initramfs, built once per test run, beside cargo's other products.
fn initramfs() -> &'static Path {
    static BUILT: OnceLock<PathBuf> = OnceLock::new();
    BUILT.get_or_init(|| {
        let dir = Path::new(env!("CARGO_TARGET_TMPDIR")).join("qemu-guest");
        let scratch = tempfile::tempdir().expect("temporary directory");
        build_initramfs(scratch.path());
        std::fs::create_dir_all(&dir).expect("directory");
        // Moved into place whole: another run may be reading the one that is there.
        let (mine, shared) = (
            dir.join(std::process::id().to_string()),
            dir.join("initramfs"),
        );
        std::fs::copy(scratch.path().join("initramfs"), &mine).expect("copied");
        std::fs::rename(mine, &shared).expect("moved");
        shared
    })
}

fn build_initramfs(dir: &Path) {
    let root = dir.join("root");
    std::fs::create_dir_all(root.join("bin")).expect("directory");
    for empty in ["proc", "sys", "dev"] {
        std::fs::create_dir(root.join(empty)).expect("directory");
    }
    run(Command::new("rustc")
        .args(["-O", "-C", "target-feature=+crt-static", "--edition=2024"])
        .arg(Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/guest/pattern.rs"))
        .arg("-o")
        .arg(root.join("bin/pattern")));
    std::fs::copy("/usr/bin/busybox", root.join("bin/busybox")).expect("busybox-static");
    let modules = modules();
    let mut load = String::new();
    for module in MODULES {
        let name = module.rsplit('/').next().expect("a name");
        if copy_module(&modules.join(module), &root.join(format!("{name}.ko"))) {
            load += &format!("$b insmod /{name}.ko\n");
        }
    }
    let init = format!(
        "#!/bin/busybox sh\nb=/bin/busybox\n$b mount -t proc proc /proc\n\
         $b mount -t devtmpfs dev /dev\n$b mount -t sysfs sys /sys\n{load}\
         $b ip addr add 10.9.0.1/24 dev eth0\n$b ip link set eth0 up\n\
         /bin/pattern $MIB $PAUSE\n$b poweroff -f\n"
    );
    std::fs::write(root.join("init"), init).expect("init");
    run(Command::new("chmod").arg("+x").arg(root.join("init")));
    run(Command::new("sh")
        .current_dir(&root)
        .arg("-c")
        .arg("find . | cpio --quiet -o -H newc > ../initramfs"));
}

/// Where the binaries of a side come from: the system's, or those named in the environment
/// (`WHIMBREL_TEST_SOURCE_QEMU`, `..._DESTINATION_QEMU`, with `..._FIRMWARE` for their `-L`), and the
/// machine type (`WHIMBREL_TEST_MACHINE`) both know.
fn from_environment(side: &str) -> (PathBuf, Vec<std::ffi::OsString>) {
    let variable = |name: &str| std::env::var_os(format!("WHIMBREL_TEST_{name}"));
    let binary = variable(&format!("{side}_QEMU")).unwrap_or("qemu-system-x86_64".into());
    let mut extra = Vec::new();
    if let Some(paths) = variable(&format!("{side}_FIRMWARE")) {
        for path in std::env::split_paths(&paths) {
            extra.extend(["-L".into(), path.into_os_string()]);
        }
    }
    (binary.into(), extra)
}

/// A running QEMU of a test, killed with it.
pub struct Guest {
    pub qmp: Qmp,
    pub serial: PathBuf,
    launched: Launched,
}

impl Guest {
    pub async fn start(dir: &Path, name: &str, load: Load, incoming: bool) -> Guest {
        let (binary, mut extra) = from_environment(if incoming { "DESTINATION" } else { "SOURCE" });
        let disk = dir.join("disk");
        if !disk.exists() {
            let file = std::fs::File::create(&disk).expect("disk");
            file.set_len(4 << 20).expect("disk");
        }
        let blockdev = serde_json::json!({
            "driver": "raw", "node-name": "disk0", "cache": {"direct": true},
            "file": {"driver": "file", "filename": disk, "cache": {"direct": true}},
        });
        for (option, value) in [
            ("-blockdev", blockdev.to_string()),
            ("-device", "virtio-blk-pci,drive=disk0,id=vd0".into()),
            ("-netdev", "hubport,id=net0,hubid=0".into()),
            (
                "-device",
                "virtio-net-pci,netdev=net0,id=vn0,romfile=".into(),
            ),
        ] {
            extra.extend([option.into(), value.into()]);
        }
        let serial = dir.join(format!("{name}.serial"));
        let spec = LaunchSpec {
            binary,
            name: name.into(),
            machine: std::env::var("WHIMBREL_TEST_MACHINE").unwrap_or("q35".into()),
            cpu: "qemu64".into(),
            memory_bytes: 192 << 20,
            memory: Memory::Private,
            vcpus: 1,
            firmware: None,
            accel: vec!["tcg".into()],
            kernel: Some(Kernel {
                image: kernel(),
                initrd: Some(initramfs().into()),
                append: format!(
                    "console=ttyS0 quiet panic=-1 MIB={} PAUSE={}",
                    load.mib, load.pause_us
                ),
            }),
            drives: Vec::new(),
            nics: Vec::new(),
            serial: Some(serial.clone()),
            qmp: ["qmp", "spare"]
                .map(|monitor| dir.join(format!("{name}.{monitor}")))
                .to_vec(),
            incoming,
            extra,
        };
        let launched = spec.spawn(&dir.join(format!("{name}.log"))).expect("QEMU");
        let qmp = launched.connect().await.expect("monitor");
        Guest {
            qmp,
            serial,
            launched,
        }
    }

    /// The last tick printed, 0 if none. Panics if the guest reports an error.
    pub fn tick(&self) -> u64 {
        let text = std::fs::read(&self.serial).unwrap_or_default();
        let text = String::from_utf8_lossy(&text);
        assert!(!text.contains("ERROR"), "the guest's memory: {text}");
        assert!(!text.contains("Call Trace"), "the guest's kernel: {text}");
        let ticks = text.lines().filter_map(|line| {
            let rest = line.trim().strip_prefix("tick ")?;
            let (tick, rest) = rest.split_once(" checked ")?;
            rest.ends_with(" errors 0").then(|| tick.parse().ok())?
        });
        ticks.max().unwrap_or(0)
    }

    /// Waits until the guest has ticked past `tick`; gives up after two minutes.
    pub async fn ticks_past(&self, tick: u64) -> u64 {
        let until = Instant::now() + Duration::from_secs(120);
        loop {
            let now = self.tick();
            if now > tick {
                return now;
            }
            let log = || std::fs::read_to_string(&self.serial);
            assert!(!self.launched.has_exited(), "QEMU died: {:?}", log());
            assert!(Instant::now() < until, "no tick past {tick}: {:?}", log());
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }

    pub async fn status(&self) -> String {
        let answer = self.qmp.execute("query-status", serde_json::json!({}));
        let answer = answer.await.expect("status");
        answer["status"].as_str().expect("status").to_owned()
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        if !self.launched.has_exited() {
            let _ = Command::new("kill")
                .args(["-9", &self.launched.pid.to_string()])
                .status();
        }
    }
}
