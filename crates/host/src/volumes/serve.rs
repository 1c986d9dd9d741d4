//! A volume as an NBD export over TCP, for as long as whoever asked for it stays.
//!
//! For tools on other computers: backups, comparing, bringing content in. A guest's disk is not served here: the
//! volume is had alone, as for a copy of it, and nothing starts on it meanwhile. Nobody may write unless that is
//! asked for.
//!
//! Who may connect. With TLS, whoever has a certificate of the folder's authority ([`super::papers`]).
//! Without, whoever reaches the port: other users of this computer at a loopback address, and at any other address
//! everybody on the network, who can also read and change what passes. So that must be asked for by a name of its
//! own.

use std::net::SocketAddr;
use std::sync::Arc;

use tokio::net::TcpListener;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;
use whimbrel_nbd::{Limits, Server, Tls};
use whimbrel_volume::backend::Backend;

use super::papers;
use crate::api::types::{ImportProgress, ServeVolume, VolumeView};
use crate::api::{ApiError, ErrorCode};
use crate::daemon::Daemon;
use crate::disk::{Disk, MachineDisks, Mode};
use crate::machines::open_data;
use crate::state::Name;

fn refused(code: ErrorCode, what: impl Into<String>) -> ApiError {
    ApiError::new(code, what).machine_state("nothing is served, the volume is as it was")
}

/// Whether content may go over this address as asked.
fn check(request: &ServeVolume) -> Result<(), ApiError> {
    let address = request.address;
    if address.port() == 0 {
        return Err(
            refused(ErrorCode::Invalid, "an export needs a port of its own")
                .next_step("name one: 10809 is NBD's"),
        );
    }
    let is_exposed = !address.ip().to_canonical().is_loopback();
    if is_exposed && request.tls.is_none() && !request.plain_text {
        return Err(refused(
            ErrorCode::Invalid,
            format!(
                "without TLS everybody who reaches {address} could read the volume, and the network what passes"
            ),
        )
        .next_step("say --tls DIR, or --plain-text if that is meant"));
    }
    Ok(())
}

/// What tools read and write is no guest's heat.
fn disk_for(name: &str, file: Arc<Backend>, writable: bool) -> Arc<Disk> {
    let (name, size) = (name.to_string(), file.size());
    Arc::new(match writable {
        true => Disk::new(name, size, file, Mode::Open),
        false => Disk::new(name, size, file, Mode::Frozen).read_only(),
    })
}

impl Daemon {
    /// Serves until it is dropped; `progress` has a total as soon as clients can connect.
    pub(crate) async fn serve_out(
        &self,
        name: Name,
        request: ServeVolume,
        progress: watch::Sender<ImportProgress>,
    ) -> Result<VolumeView, ApiError> {
        check(&request)?;
        let (record, claim) = self.alone(&name).await?;
        let tls = match &request.tls {
            None => Tls::Off,
            Some(folder) => {
                let names = self.names_at(request.address);
                Tls::Required(papers::server(folder, &names)?)
            }
        };
        let file = open_data(&self.host, &record).await?;
        if request.writable {
            self.host.trackers.lose(&self.host.state, &record);
        }
        let disk = disk_for(name.as_str(), file, request.writable);
        let listener = TcpListener::bind(request.address).await.map_err(|e| {
            refused(
                ErrorCode::Io,
                format!("the address cannot be listened on: {e}"),
            )
            .at(Some(request.address.to_string()))
            .next_step("name an address of this host and a port that is free")
        })?;
        let directory = Arc::new(MachineDisks::new([disk.clone()]));
        let server = Server::new(directory, Limits::default()).with_tls(tls);
        let stop = CancellationToken::new();
        let until = stop.clone();
        let serving = tokio::spawn(async move {
            server.serve_tcp(listener, until).await;
            // A client that is left behind writes nothing any more, and what was written stays.
            if let Err(error) = disk.freeze().await {
                tracing::error!(volume = disk.name(), %error, "what clients wrote may not outlive a power cut");
            }
            drop(claim);
        });
        let _stopped_with_this = stop.drop_guard();
        let total = record.size;
        tracing::info!(volume = %name, address = %request.address, tls = request.tls.is_some(),
            writable = request.writable, "a volume is served");
        progress.send_replace(ImportProgress { done: 0, total });
        // Ends only by a panic of its own.
        let _ = serving.await;
        Ok(self.volume_view(record).await)
    }

    /// What clients may call this host by, if they ask for its certificate.
    fn names_at(&self, address: SocketAddr) -> Vec<String> {
        let mut names = vec!["localhost".to_string(), self.host.name.clone()];
        if !address.ip().is_unspecified() {
            names.push(address.ip().to_canonical().to_string());
        }
        for loopback in ["127.0.0.1", "::1"] {
            if !names.iter().any(|name| name == loopback) {
                names.push(loopback.to_string());
            }
        }
        names
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use whimbrel_volume::backend::Format;
    use whimbrel_volume::pool::{Pool, PoolSize};

    fn request(address: &str, tls: bool, plain_text: bool) -> ServeVolume {
        ServeVolume {
            address: address.parse().expect("an address"),
            tls: tls.then(|| "/pki".into()),
            plain_text,
            writable: false,
        }
    }

    #[test]
    fn plain_text_leaves_this_computer_only_if_that_is_said() {
        for (address, tls, plain_text, is_fine) in [
            ("127.0.0.1:10809", false, false, true),
            ("[::1]:10809", false, false, true),
            ("[::ffff:127.0.0.1]:10809", false, false, true),
            ("192.0.2.1:10809", false, false, false),
            ("0.0.0.0:10809", false, false, false),
            ("[::]:10809", false, false, false),
            ("0.0.0.0:10809", false, true, true),
            ("0.0.0.0:10809", true, false, true),
            ("127.0.0.1:0", false, false, false),
        ] {
            let checked = check(&request(address, tls, plain_text));
            assert_eq!(checked.is_ok(), is_fine, "{address}");
        }
    }

    /// What nbdcopy makes of an export of eight MiB over TLS.
    async fn copied_by_nbdcopy(
        writable: bool,
        args: impl Fn(&str) -> Vec<String>,
    ) -> (bool, Vec<u8>) {
        let folder = tempfile::tempdir().expect("temporary folder");
        let pki = folder.path().join("pki");
        let names = ["localhost".to_string(), "127.0.0.1".to_string()];
        let config = papers::server(&pki, &names).expect("certificates");
        let pool = Pool::start(PoolSize::default()).expect("threads");
        let path = folder.path().join("disk");
        let file = Backend::create(&pool, &path, Format::Raw, 8 << 20).await;
        let disk = disk_for("disk", Arc::new(file.expect("room")), writable);
        let server = Server::new(Arc::new(MachineDisks::new([disk])), Limits::default())
            .with_tls(Tls::Required(config));
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
        let port = listener.local_addr().expect("an address").port();
        let stop = CancellationToken::new();
        let _stopped = stop.clone().drop_guard();
        tokio::spawn(async move { server.serve_tcp(listener, stop).await });
        let image = folder.path().join("image");
        std::fs::write(&image, vec![7; 8 << 20]).expect("room");
        let uri = format!(
            "nbds://localhost:{port}/disk?tls-certificates={}",
            pki.display()
        );
        let copied = tokio::process::Command::new("nbdcopy")
            .args(args(&uri).iter().map(|arg| match arg.as_str() {
                "IMAGE" => image.clone().into_os_string(),
                "OUT" => folder.path().join("out").into_os_string(),
                arg => arg.into(),
            }))
            .kill_on_drop(true)
            .output()
            .await
            .expect("nbdcopy");
        let out = folder.path().join(if writable { "disk" } else { "out" });
        (
            copied.status.success(),
            std::fs::read(out).unwrap_or_default(),
        )
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn clients_with_a_certificate_read_and_write_only_if_they_may() {
        let [uri, image, out] = ["URI", "IMAGE", "OUT"];
        let with = |uri: &str, arg: &str| if arg == "URI" { uri } else { arg }.to_string();
        let copy = |from, to| move |at: &str| vec![with(at, from), with(at, to)];
        assert_eq!(
            copied_by_nbdcopy(false, copy(uri, out)).await,
            (true, vec![0; 8 << 20])
        );
        assert!(!copied_by_nbdcopy(false, copy(image, uri)).await.0);
        assert_eq!(
            copied_by_nbdcopy(true, copy(image, uri)).await,
            (true, vec![7; 8 << 20])
        );
        let stranger = |at: &str| {
            let elsewhere = at.replace("tls-certificates=", "tls-certificates=/nowhere");
            vec![elsewhere, out.to_string()]
        };
        assert!(!copied_by_nbdcopy(false, stranger).await.0);
    }
}
