//! The guests' kernel: Debian's cloud kernel with its modules.
//!
//! An installed one is used as it is. Where none is installed, its package is downloaded and unpacked below cargo's
//! target folder and *not* installed: installing a kernel would build an initramfs and touch the boot loader of
//! somebody's machine, and only two things of it are needed.
//!
//! Two things an unpacked package lacks are made here, by busybox. `modules.dep` is written by an installation only.
//! And newer kernels come with compressed modules (`.ko.xz`), which guests without xz cannot load: they are unpacked,
//! and an installed kernel that has only those is passed over.

use std::ffi::OsStr;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::apt;
use crate::error::Error;
use crate::process;
use crate::workspace::{Workspace, list};

const PACKAGE: &str = "linux-image-cloud-amd64";

/// The image of the kernel the guests use: the one that `WHIMBREL_KERNEL` names, else an installed one, else the one
/// that was fetched. Its modules are where an installation puts them: those of `X/boot/vmlinuz-VERSION` are in
/// `X/lib/modules/VERSION`.
pub fn find(workspace: &Workspace) -> Option<PathBuf> {
    std::env::var_os("WHIMBREL_KERNEL")
        .map(PathBuf::from)
        .or_else(|| below(Path::new("/")))
        .or_else(|| below(&fetched(workspace)))
}

/// Downloads and unpacks the kernel.
pub fn fetch(workspace: &Workspace) -> Result<PathBuf, Error> {
    let folder = fetched(workspace);
    println!(
        "This machine lacks a cloud kernel for the guests; its package is unpacked into {} (nothing is installed)",
        folder.display()
    );
    if process::find_program("apt-get").is_none() || process::find_program("dpkg").is_none() {
        return Err(Error::Kernel {
            why: "This is not Debian, so no kernel can be fetched.".into(),
        });
    }
    // Made whole beside its place and then renamed: an attempt that was broken off leaves nothing that looks usable.
    let fresh = folder.with_extension("new");
    let file_error = |cause| Error::File {
        path: fresh.clone(),
        cause,
    };
    for old in [&fresh, &folder].into_iter().filter(|old| old.exists()) {
        fs::remove_dir_all(old).map_err(file_error)?;
    }
    fs::create_dir_all(&fresh).map_err(file_error)?;
    // The lists may be missing, or name a version that is gone from the mirror: then once more with new ones.
    let archive = match download(&fresh) {
        Ok(archive) => archive,
        Err(_) => {
            apt::update();
            download(&fresh)?
        }
    };
    unpack(&archive, &fresh).map_err(|error| Error::Kernel {
        why: error.to_string(),
    })?;
    fs::rename(&fresh, &folder).map_err(file_error)?;
    below(&folder).ok_or_else(|| Error::Kernel {
        why: format!("{} holds no kernel.", archive.display()),
    })
}

/// Downloads the package of the newest kernel into the folder.
fn download(folder: &Path) -> Result<PathBuf, Error> {
    let package = image_package().ok_or_else(|| Error::Kernel {
        why: format!("No configured source of packages has {PACKAGE}."),
    })?;
    println!("Downloading {package}");
    let mut download = apt::apt_get();
    // Apt's own unprivileged user may not write here, and apt would say so at length.
    download
        .args(["-qq", "-o", "APT::Sandbox::User=root", "download", &package])
        .current_dir(folder);
    process::run(&mut download).map_err(|error| Error::Kernel {
        why: error.to_string(),
    })?;
    list(folder)?
        .into_iter()
        .find(|file| file.extension() == Some(OsStr::new("deb")))
        .ok_or_else(|| Error::Kernel {
            why: format!("apt said it downloaded {package}, but did not."),
        })
}

/// Unpacks a kernel's package into the folder and makes its modules loadable.
fn unpack(archive: &Path, folder: &Path) -> Result<(), Error> {
    let file_error = |cause| Error::File {
        path: folder.to_path_buf(),
        cause,
    };
    process::run(Command::new("dpkg").arg("-x").arg(archive).arg(folder))?;
    fs::remove_file(archive).map_err(file_error)?;
    // Newer packages have usr/lib only; depmod looks into lib.
    if !folder.join("lib").exists() {
        std::os::unix::fs::symlink("usr/lib", folder.join("lib")).map_err(file_error)?;
    }
    for modules in list(&folder.join("lib/modules"))? {
        let mut decompress = Command::new("find");
        decompress
            .arg(&modules)
            .args(["-name", "*.ko.xz", "-exec", "busybox", "unxz", "{}", "+"]);
        process::run(&mut decompress)?;
        let version = modules.file_name().unwrap_or_default();
        process::run(
            Command::new("busybox")
                .args(["depmod", "-b"])
                .arg(folder)
                .arg(version),
        )?;
    }
    Ok(())
}

fn fetched(workspace: &Workspace) -> PathBuf {
    workspace.target().join("lab/kernel")
}

/// The newest cloud kernel below `root` that has its modules, loadable as they are.
fn below(root: &Path) -> Option<PathBuf> {
    let mut kernels: Vec<PathBuf> = list(&root.join("boot"))
        .ok()?
        .into_iter()
        .filter(|image| {
            image
                .file_name()
                .and_then(OsStr::to_str)
                .and_then(|name| name.strip_prefix("vmlinuz-"))
                .filter(|version| version.ends_with("-cloud-amd64"))
                .is_some_and(|version| has_plain_modules(&root.join("lib/modules").join(version)))
        })
        .collect();
    kernels.sort_by_key(|image| numbers(image));
    kernels.pop()
}

/// Whether the modules are not compressed, judged by those every guest needs: the drivers of disks.
fn has_plain_modules(modules: &Path) -> bool {
    list(&modules.join("kernel/drivers/block")).is_ok_and(|files| {
        files
            .iter()
            .any(|file| file.extension() == Some(OsStr::new("ko")))
    })
}

/// The numbers in a name, for comparing versions: 6.1.0-56 is newer than 6.1.0-9.
fn numbers(image: &Path) -> Vec<u64> {
    image
        .file_name()
        .unwrap_or_default()
        .to_string_lossy()
        .split(|c: char| !c.is_ascii_digit())
        .filter_map(|digits| digits.parse().ok())
        .collect()
}

/// The package of the kernel itself: [`PACKAGE`] only points to the newest one. None where no source has it.
fn image_package() -> Option<String> {
    let mut query = Command::new("apt-cache");
    query
        .args(["depends", PACKAGE])
        .stderr(std::process::Stdio::null());
    let output = query.output().ok()?;
    first_image(&String::from_utf8_lossy(&output.stdout))
}

fn first_image(depends: &str) -> Option<String> {
    depends.lines().find_map(|line| {
        let name = line.trim().strip_prefix("Depends: ")?;
        name.starts_with("linux-image-").then(|| name.to_string())
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_newest_kernel_that_has_its_modules_is_taken() {
        let root = std::env::temp_dir().join(format!("whimbrel-kernel-{}", std::process::id()));
        let add = |version: &str, module: Option<&str>| {
            fs::create_dir_all(root.join("boot")).unwrap();
            fs::write(root.join("boot").join(format!("vmlinuz-{version}")), "").unwrap();
            if let Some(module) = module {
                let block = root
                    .join("lib/modules")
                    .join(version)
                    .join("kernel/drivers/block");
                fs::create_dir_all(&block).unwrap();
                fs::write(block.join(module), "").unwrap();
            }
        };
        assert_eq!(below(&root), None);
        add("6.1.0-9-cloud-amd64", Some("virtio_blk.ko"));
        add("6.1.0-56-cloud-amd64", Some("virtio_blk.ko"));
        add("6.1.0-57-cloud-amd64", None);
        add("6.1.0-58-cloud-amd64", Some("virtio_blk.ko.xz"));
        add("6.1.0-59-amd64", Some("virtio_blk.ko"));
        assert_eq!(
            below(&root),
            Some(root.join("boot/vmlinuz-6.1.0-56-cloud-amd64"))
        );
        fs::remove_dir_all(&root).unwrap();
    }

    #[test]
    fn the_kernels_package_is_read_from_what_the_pointing_package_depends_on() {
        let text = "linux-image-cloud-amd64\n  Depends: linux-image-6.1.0-56-cloud-amd64\n    linux-image-x\n";
        assert_eq!(
            first_image(text).as_deref(),
            Some("linux-image-6.1.0-56-cloud-amd64")
        );
        assert_eq!(first_image(""), None);
    }
}
