//! A trace of what a guest asks of a disk, recorded where its requests come in.

use std::fs::{File, OpenOptions};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Weak};
use std::time::Duration;

use tokio::sync::{oneshot, watch};
use whimbrel_volume::trace::TraceError;

use crate::api::types::{RecordTrace, RecordingEnd, RecordingProgress, RecordingView};
use crate::api::{ApiError, ErrorCode};
use crate::daemon::Daemon;
use crate::disk::{Disk, Recorder};
use crate::state::Name;

fn refused(code: ErrorCode, what: impl Into<String>) -> ApiError {
    ApiError::new(code, what).machine_state("nothing is recorded; the machine is as it was")
}

/// A recording whose asker may go away.
struct Asked {
    recorder: Arc<Recorder>,
    disk: Weak<Disk>,
}

impl Asked {
    fn end(&self, why: RecordingEnd) {
        // A disk that has gone has ended it by itself.
        if let Some(disk) = self.disk.upgrade() {
            disk.recording().end_of(&self.recorder, why);
        }
    }
}

impl Drop for Asked {
    fn drop(&mut self) {
        self.end(RecordingEnd::Left);
    }
}

impl Daemon {
    /// Records until the time is over, it is ended, or it is dropped; the trace is finished in each case.
    pub(crate) async fn record_trace(
        &self,
        name: Name,
        request: RecordTrace,
        progress: watch::Sender<RecordingProgress>,
    ) -> Result<RecordingView, ApiError> {
        let disk = self.disk_to_record(&name).await?;
        let volume = disk.name().to_string();
        let Some(recorder) = disk.recording().begin() else {
            return Err(refused(
                ErrorCode::Busy,
                format!("volume `{volume}` is being recorded"),
            )
            .next_step("wait for that, or end it"));
        };
        let asked = Asked {
            recorder: recorder.clone(),
            disk: Arc::downgrade(&disk),
        };
        drop(disk);
        let file = make(&request.file)?;
        let (done, mut is_done) = oneshot::channel();
        let write = move || {
            let result = recorder.write(file, |so_far| {
                progress.send_replace(so_far);
            });
            // Nobody waits for it if whoever asked went away.
            let _ = done.send(result);
        };
        std::thread::Builder::new()
            .name("recorder".to_string())
            .spawn(write)
            .map_err(|e| failed(&request.file, e.into()))?;
        tracing::info!(%volume, file = %request.file.display(), "what the guest asks of the volume is recorded");
        let time = async {
            match request.for_ms {
                Some(ms) => tokio::time::sleep(Duration::from_millis(ms)).await,
                None => std::future::pending().await,
            }
        };
        let result = tokio::select! {
            result = &mut is_done => result,
            () = time => {
                asked.end(RecordingEnd::Time);
                is_done.await
            }
        };
        let (came_to, ended) = match result {
            Ok(written) => written.map_err(|e| failed(&request.file, e))?,
            Err(_) => {
                let what = "the recording broke off by a fault of the program";
                return Err(ApiError::new(ErrorCode::Internal, what)
                    .next_step("look into the daemon's log"));
            }
        };
        Ok(RecordingView {
            volume: volume
                .parse()
                .map_err(|_| refused(ErrorCode::Internal, "the volume has no name"))?,
            file: request.file,
            came_to,
            ended,
        })
    }

    /// Ends a recording as its time would.
    pub(crate) async fn end_recording_of(&self, name: Name) -> Result<(), ApiError> {
        let disk = self.disk_to_record(&name).await?;
        if disk.recording().end(RecordingEnd::Asked) {
            return Ok(());
        }
        Err(ApiError::new(
            ErrorCode::NotFound,
            format!("nobody records `{name}`"),
        ))
    }

    /// The disk of a machine that runs: by its volume's name, or by the machine's if it has one disk.
    async fn disk_to_record(&self, name: &Name) -> Result<Arc<Disk>, ApiError> {
        let mut of_machine = None;
        for machine in self.machines.all() {
            let standing = machine.lock().await;
            let disks = standing
                .running
                .as_ref()
                .filter(|running| !running.has_ended())
                .map(|running| running.disks.clone());
            for disk in disks.iter().flatten() {
                if disk.name() == name.as_str() {
                    return Ok(disk.clone());
                }
            }
            if &machine.name == name {
                of_machine = Some(disks);
            }
        }
        let Some(disks) = of_machine else {
            // A volume that nobody uses, or nothing at all: that is told by its record.
            self.host.state.volume(name)?;
            return Err(refused(
                ErrorCode::WrongState,
                format!("no machine runs on volume `{name}` here"),
            )
            .next_step("start its machine first: only a guest's requests are recorded"));
        };
        match disks.as_deref() {
            None => Err(refused(
                ErrorCode::WrongState,
                format!("machine `{name}` does not run here"),
            )
            .next_step(format!("start it first: whimbrel machine start {name}"))),
            Some([disk]) => Ok(disk.clone()),
            Some(disks) => {
                let names: Vec<_> = disks.iter().map(|disk| disk.name()).collect();
                Err(refused(
                    ErrorCode::Invalid,
                    format!("machine `{name}` has {} disks", disks.len()),
                )
                .next_step(match names.is_empty() {
                    true => "there is nothing to record".to_string(),
                    false => format!("name one of them: {}", names.join(", ")),
                }))
            }
        }
    }
}

/// The file, new and for its owner alone: a trace tells much of what a guest does.
fn make(path: &PathBuf) -> Result<File, ApiError> {
    let made = OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(path);
    made.map_err(|e| {
        let code = match e.kind() {
            std::io::ErrorKind::AlreadyExists => ErrorCode::Exists,
            _ => ErrorCode::Io,
        };
        refused(code, format!("the trace cannot be made: {e}"))
            .at(Some(path.display().to_string()))
            .next_step("name a file that does not exist yet, in a folder that does")
    })
}

fn failed(path: &Path, error: TraceError) -> ApiError {
    let code = match &error {
        TraceError::Io(e) if e.kind() == std::io::ErrorKind::StorageFull => ErrorCode::StorageFull,
        _ => ErrorCode::Io,
    };
    ApiError::new(code, format!("the trace cannot be written: {error}"))
        .at(Some(path.display().to_string()))
        .machine_state(
            "the machine is as it was; what was recorded until then can be read, and says that it was cut off",
        )
        .next_step("make room, or record to another place")
}
