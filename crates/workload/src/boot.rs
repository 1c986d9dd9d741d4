//! Being process 1: mounts, modules, network, disk, and the end.

use rustix::mount::{MountFlags, UnmountFlags, mount, unmount};
use std::ffi::CStr;
use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};
use whimbrel_workload::Error;
use whimbrel_workload::params::Params;

/// Folder of the initramfs that holds the modules.
const MODULES: &str = "/modules";
/// In [`MODULES`]: their file names, one a line, in the order in which they load.
const MODULE_ORDER: &str = "order";

const PATIENCE: Duration = Duration::from_secs(15);

fn io_error(action: &'static str, path: impl Into<PathBuf>) -> impl FnOnce(io::Error) -> Error {
    let path = path.into();
    move |source| Error::Io {
        action,
        path,
        source,
    }
}

fn mount_on(source: &str, on: &str, kind: &str, flags: MountFlags) -> Result<(), Error> {
    std::fs::create_dir_all(on).map_err(io_error("create", on))?;
    mount(source, on, kind, flags, None::<&CStr>).map_err(|e| io_error("mount", on)(e.into()))
}

/// The kernel's file systems; after it the command line can be read.
pub fn mount_kernel() -> Result<(), Error> {
    mount_on("proc", "/proc", "proc", MountFlags::empty())?;
    mount_on("sysfs", "/sys", "sysfs", MountFlags::empty())?;
    mount_on("devtmpfs", "/dev", "devtmpfs", MountFlags::empty())
}

pub fn cmdline() -> Result<String, Error> {
    let path = "/proc/cmdline";
    std::fs::read_to_string(path).map_err(io_error("read", path))
}

/// Loads the initramfs's modules.
pub fn load_modules() -> Result<(), Error> {
    let order = Path::new(MODULES).join(MODULE_ORDER);
    let names = std::fs::read_to_string(&order).map_err(io_error("read", order))?;
    for name in names.lines() {
        let path = Path::new(MODULES).join(name);
        let file = File::open(&path).map_err(io_error("open", &path))?;
        match rustix::system::finit_module(&file, c"", 0) {
            Ok(()) | Err(rustix::io::Errno::EXIST) => {}
            Err(errno) => return Err(io_error("load", path)(errno.into())),
        }
    }
    Ok(())
}

fn await_some<T>(mut look: impl FnMut() -> Option<T>) -> Option<T> {
    let until = Instant::now() + PATIENCE;
    loop {
        match look() {
            None if Instant::now() < until => std::thread::sleep(Duration::from_millis(5)),
            seen => return seen,
        }
    }
}

fn ip(words: &[&str]) -> Result<(), Error> {
    let status = Command::new("/bin/busybox").arg("ip").args(words).status();
    match status {
        Ok(status) if status.success() => Ok(()),
        _ => Err(Error::Command {
            command: format!("ip {}", words.join(" ")),
        }),
    }
}

/// Gives the first interface its address and brings it up.
pub fn network(params: &Params) -> Result<(), Error> {
    ip(&["link", "set", "lo", "up"])?;
    let Some(cidr) = params.ip else {
        return Ok(());
    };
    let first = || {
        let names = std::fs::read_dir("/sys/class/net").ok()?;
        let mut names: Vec<String> = names
            .filter_map(|entry| entry.ok()?.file_name().into_string().ok())
            .filter(|name| name != "lo")
            .collect();
        names.sort();
        names.into_iter().next()
    };
    let name = await_some(first).ok_or(Error::NoInterface {
        seconds: PATIENCE.as_secs(),
    })?;
    ip(&["addr", "add", &cidr.to_string(), "dev", &name])?;
    ip(&["link", "set", &name, "up"])?;
    if let Some(gateway) = params.gateway {
        ip(&["route", "add", "default", "via", &gateway.to_string()])?;
    }
    Ok(())
}

/// Mounts the disk, if there is to be one; whether there is.
pub fn mount_disk(params: &Params) -> Result<bool, Error> {
    if params.disk == "none" {
        return Ok(false);
    }
    let device = PathBuf::from(&params.disk);
    await_some(|| device.exists().then_some(())).ok_or_else(|| Error::NoDisk {
        path: device.clone(),
        seconds: PATIENCE.as_secs(),
    })?;
    let on = params.dir.to_string_lossy();
    mount_on(&params.disk, &on, "ext4", MountFlags::NOATIME)?;
    Ok(true)
}

/// Everything on the disk, and the disk off. Tries for a while: a thread may still close its files.
pub fn unmount_disk(params: &Params) -> io::Result<()> {
    rustix::fs::sync();
    let mut last = None;
    for _ in 0..40 {
        match unmount(&params.dir, UnmountFlags::empty()) {
            Ok(()) => return Ok(()),
            Err(errno) => last = Some(errno),
        }
        std::thread::sleep(Duration::from_millis(50));
    }
    Err(last.map_or_else(|| io::ErrorKind::TimedOut.into(), io::Error::from))
}

/// Powers the machine off; returns only if the kernel refuses.
pub fn power_off() -> io::Error {
    rustix::fs::sync();
    match rustix::system::reboot(rustix::system::RebootCommand::PowerOff) {
        Ok(()) => io::ErrorKind::Other.into(),
        Err(errno) => errno.into(),
    }
}

/// Seconds since the kernel started.
pub fn uptime() -> f64 {
    let text = std::fs::read_to_string("/proc/uptime").unwrap_or_default();
    let first = text.split_whitespace().next().unwrap_or_default();
    first.parse().unwrap_or(0.0)
}
