//! Debian's cloud kernel, installed or unpacked somewhere, and those of its modules that a guest needs.

use super::{GuestError, tool};
use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

/// A kernel image with its modules' folder.
#[derive(Clone, Debug)]
pub struct Kernel {
    /// The bzImage.
    pub image: PathBuf,
    /// As `uname -r` says it.
    pub release: String,
    modules: PathBuf,
}

impl Kernel {
    /// The newest `/boot/vmlinuz-*-cloud-amd64` that has modules; `WHIMBREL_KERNEL` names another
    /// image, `X/boot/vmlinuz-RELEASE` with its modules in `X/lib/modules/RELEASE`.
    pub fn find() -> Result<Kernel, GuestError> {
        if let Some(image) = std::env::var_os("WHIMBREL_KERNEL") {
            return Kernel::of(Path::new(&image)).ok_or(GuestError::NoKernel);
        }
        let boot = Path::new("/boot");
        let entries = std::fs::read_dir(boot).map_err(GuestError::io("read", boot))?;
        entries
            .filter_map(|entry| Kernel::of(&entry.ok()?.path()))
            .filter(|kernel| kernel.release.ends_with("-cloud-amd64"))
            .max_by_key(|kernel| version(&kernel.release))
            .ok_or(GuestError::NoKernel)
    }

    fn of(image: &Path) -> Option<Kernel> {
        let release = image.file_name()?.to_str()?.strip_prefix("vmlinuz-")?;
        let root = image.parent()?.parent()?;
        let modules = root.join("lib/modules").join(release);
        modules.join("modules.dep").exists().then(|| Kernel {
            image: image.into(),
            release: release.into(),
            modules,
        })
    }

    /// The files of `wanted` and of all they depend on, in the order in which they load. What is built
    /// into the kernel is left out.
    pub fn modules(&self, wanted: &[&str]) -> Result<Vec<PathBuf>, GuestError> {
        let dep = self.modules.join("modules.dep");
        let dep = std::fs::read_to_string(&dep).map_err(GuestError::io("read", dep))?;
        let builtin = self.modules.join("modules.builtin");
        let builtin = std::fs::read_to_string(&builtin).map_err(GuestError::io("read", builtin))?;
        let order = load_order(&dep, &builtin, wanted).map_err(|module| GuestError::NoModule {
            release: self.release.clone(),
            module,
        })?;
        Ok(order.iter().map(|path| self.modules.join(path)).collect())
    }
}

/// The numbers in a release, so that 6.1.0-10 comes after 6.1.0-9.
fn version(release: &str) -> Vec<u64> {
    release
        .split(|c: char| !c.is_ascii_digit())
        .filter_map(|digits| digits.parse().ok())
        .collect()
}

/// `kernel/drivers/block/virtio_blk.ko.xz` is the module `virtio_blk`.
fn module_name(path: &str) -> String {
    let file = path.rsplit('/').next().unwrap_or(path);
    let name = file.split(".ko").next().unwrap_or(file);
    name.replace('-', "_")
}

/// Depth first through modules.dep; the name of a module that is nowhere is the error.
fn load_order(dep: &str, builtin: &str, wanted: &[&str]) -> Result<Vec<String>, String> {
    let builtin: BTreeSet<String> = builtin.lines().map(module_name).collect();
    let mut needs: BTreeMap<String, (&str, Vec<String>)> = BTreeMap::new();
    for line in dep.lines() {
        if let Some((path, deps)) = line.split_once(':') {
            let deps = deps.split_whitespace().map(module_name).collect();
            needs.insert(module_name(path), (path, deps));
        }
    }
    let mut order = Vec::new();
    let mut seen = BTreeSet::new();
    // (module, its dependencies are done)
    let mut stack: Vec<(String, bool)> = Vec::new();
    stack.extend(
        wanted
            .iter()
            .rev()
            .map(|name| (name.replace('-', "_"), false)),
    );
    while let Some((name, ready)) = stack.pop() {
        if builtin.contains(&name) {
            continue;
        }
        let Some((path, deps)) = needs.get(&name) else {
            return Err(name);
        };
        if ready {
            order.push((*path).to_string());
        } else if seen.insert(name.clone()) {
            stack.push((name, true));
            stack.extend(deps.iter().map(|dep| (dep.clone(), false)));
        }
    }
    Ok(order)
}

/// A module's file as the kernel takes it: decompressed.
pub fn read_module(path: &Path) -> Result<Vec<u8>, GuestError> {
    let unpack = match path.extension().and_then(|e| e.to_str()) {
        Some("xz") => "xz",
        Some("zst") => "zstd",
        Some("gz") => "gzip",
        _ => return std::fs::read(path).map_err(GuestError::io("read", path)),
    };
    tool::run(unpack, &["-dc".as_ref(), path.as_os_str()])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_needed_loads_first_and_once() {
        let dep = "k/virtio.ko.xz: k/virtio-ring.ko.xz\nk/virtio-ring.ko.xz:\n\
                   k/blk.ko.xz: k/virtio.ko.xz k/virtio-ring.ko.xz\nk/net.ko.xz: k/virtio.ko.xz\n";
        let order = load_order(dep, "k/ext4.ko\n", &["blk", "ext4", "net"]);
        let expected = [
            "k/virtio-ring.ko.xz",
            "k/virtio.ko.xz",
            "k/blk.ko.xz",
            "k/net.ko.xz",
        ];
        assert_eq!(order, Ok(expected.map(String::from).into()));
        assert_eq!(load_order(dep, "", &["ext4"]), Err("ext4".into()));
    }

    #[test]
    fn an_unpacked_kernel_has_its_modules_beside_it() {
        let root = tempfile::tempdir().expect("a folder");
        let image = root.path().join("boot/vmlinuz-6.9-cloud-amd64");
        let modules = root.path().join("lib/modules/6.9-cloud-amd64");
        std::fs::create_dir_all(&modules).expect("a folder");
        assert!(Kernel::of(&image).is_none());
        std::fs::write(modules.join("modules.dep"), "kernel/blk.ko.xz:\n").expect("a file");
        std::fs::write(modules.join("modules.builtin"), "").expect("a file");
        let kernel = Kernel::of(&image).expect("a kernel");
        assert_eq!(kernel.release, "6.9-cloud-amd64");
        let blk = kernel.modules(&["blk"]).expect("its modules");
        assert_eq!(blk, [modules.join("kernel/blk.ko.xz")]);
    }

    #[test]
    fn releases_are_compared_as_numbers() {
        assert!(version("6.1.0-10-cloud-amd64") > version("6.1.0-9-cloud-amd64"));
    }
}
