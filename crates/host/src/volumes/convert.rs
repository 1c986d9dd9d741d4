//! Formats that only QEMU reads: sparse and compressed VMDK, by `qemu-img` if it is there.

use std::path::Path;
use std::process::Stdio;

use tokio::io::AsyncReadExt;
use tokio::process::Command;
use tokio::sync::watch;
use whimbrel_engine::space::SECTOR;
use whimbrel_volume::backend::{Backend, Format};
use whimbrel_volume::raw::Access;

use super::make::NewVolume;
use crate::api::types::ImportProgress;
use crate::api::{ApiError, ErrorCode};
use crate::host::Host;
use crate::service::errors::volume_error;

const PROGRAM: &str = "qemu-img";

/// Of what it says when it fails, so much is told.
const SAID: usize = 2000;

fn failed(what: String) -> ApiError {
    ApiError::new(ErrorCode::Io, what)
        .at(Some(PROGRAM.to_string()))
        .machine_state("no volume was made")
        .next_step("put right what the message names and try again")
}

fn missing(e: std::io::Error) -> ApiError {
    match e.kind() {
        std::io::ErrorKind::NotFound => ApiError::new(
            ErrorCode::Unsupported,
            "this VMDK is sparse or compressed, and only `qemu-img` reads those, which is not here",
        )
        .machine_state("no volume was made")
        .next_step(
            "install it (Debian: qemu-utils), or convert the image elsewhere and import that",
        ),
        _ => failed(format!("{PROGRAM} cannot be run: {e}")),
    }
}

/// Whether it is a description of flat files in text.
pub async fn is_flat_vmdk(file: &Path) -> bool {
    let mut head = [0; 21];
    let Ok(mut file) = tokio::fs::File::open(file).await else {
        return true;
    };
    file.read_exact(&mut head).await.is_ok() && head == *b"# Disk DescriptorFile"
}

/// Converts into the new volume; holes stay holes.
pub async fn vmdk(
    host: &Host,
    new: &mut NewVolume,
    file: &Path,
    progress: &watch::Sender<ImportProgress>,
) -> Result<(), ApiError> {
    let total = size_of(file).await?;
    let format = new.record.format;
    let to = new.open(host, total.next_multiple_of(SECTOR)).await?;
    if format == Format::Device {
        to.blank(to.size()).await.map_err(volume_error)?;
    }
    // It opens the file itself.
    drop(to);
    let out = match format {
        Format::Qcow2 => "qcow2",
        Format::Raw | Format::Device => "raw",
    };
    // Into what is there and reads as zeroes: it skips zeroes, in grains as an import of ours does.
    let mut child = Command::new(PROGRAM)
        .args([
            "convert",
            "-p",
            "-n",
            "--target-is-zero",
            "-S",
            "64k",
            "-f",
            "vmdk",
            "-O",
            out,
        ])
        .arg(file)
        .arg(new.path())
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .kill_on_drop(true)
        .spawn()
        .map_err(missing)?;
    let (Some(mut said), Some(mut complaint)) = (child.stdout.take(), child.stderr.take()) else {
        return Err(failed("its output cannot be read".to_string()));
    };
    let told = async {
        let (mut piece, mut line) = ([0; 256], String::new());
        while let Ok(n @ 1..) = said.read(&mut piece).await {
            line.push_str(&String::from_utf8_lossy(&piece[..n]));
            // "    (12.34/100%)" and a carriage return, over and over.
            let percent = line.rsplit('(').next().and_then(|t| t.split('/').next());
            if let Some(percent) = percent.and_then(|p| p.trim().parse::<f64>().ok()) {
                let done = (total as f64 * percent / 100.0) as u64;
                progress.send_replace(ImportProgress { done, total });
            }
            if line.len() > 512 {
                line.drain(..line.len() / 2);
            }
        }
    };
    let heard = async {
        let mut all = Vec::new();
        let mut piece = [0; 512];
        while let Ok(n @ 1..) = complaint.read(&mut piece).await {
            let room = SAID.saturating_sub(all.len());
            all.extend_from_slice(&piece[..n.min(room)]);
        }
        String::from_utf8_lossy(&all).trim().to_string()
    };
    let ((), complaint, ended) = tokio::join!(told, heard, child.wait());
    let ended = ended.map_err(|e| failed(e.to_string()))?;
    if !ended.success() {
        return Err(failed(format!(
            "the image cannot be converted: {complaint}"
        )));
    }
    let made = Backend::open(&host.pool, new.path(), format, Access::ReadWrite).await;
    let made = made.map_err(volume_error)?;
    made.narrowed(new.record.size)
        .map_err(volume_error)?
        .sync()
        .await
        .map_err(volume_error)
}

async fn size_of(file: &Path) -> Result<u64, ApiError> {
    let out = Command::new(PROGRAM)
        .args(["info", "--output=json", "-f", "vmdk"])
        .arg(file)
        .stdin(Stdio::null())
        .kill_on_drop(true)
        .output()
        .await
        .map_err(missing)?;
    let told: serde_json::Value = serde_json::from_slice(&out.stdout).unwrap_or_default();
    told["virtual-size"].as_u64().ok_or_else(|| {
        let complaint = String::from_utf8_lossy(&out.stderr);
        failed(format!("the image cannot be read: {}", complaint.trim()))
    })
}
