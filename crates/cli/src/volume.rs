//! `whimbrel volume ...`

use crate::args::{StoreArg, VolumeCommand};
use crate::context::Context;
use crate::error::CliError;
use crate::picture;
use crate::progress::ImportShow;
use crate::show;
use hyper::Method;
use serde::Serialize;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use whimbrel_host::api::{
    CheckView, CheckVolume, CloneVolume, CreateVolume, ExportVolume, FindingKind, Format,
    ImportProgress, ImportVolume, Listed, ResizeVolume, ServeVolume, VolumeView,
};
use whimbrel_host::state::Name;

pub async fn volume(context: &Context, command: VolumeCommand) -> Result<(), CliError> {
    let client = &context.client;
    match command {
        VolumeCommand::Create {
            name,
            size,
            format,
            device,
            awaits,
        } => {
            let request = CreateVolume {
                name,
                size,
                format: stored(format, device.as_ref()),
                device: device.as_deref().map(whole_path).transpose()?,
                awaits,
            };
            let view = client.post("/v1/volumes", &request).await?;
            context.answer(&view, show::volume);
        }
        VolumeCommand::Import {
            name,
            from,
            format,
            to,
            device,
        } => {
            let is_uri = from.starts_with("nbd://") || from.starts_with("nbd+unix://");
            let (file, uri) = if is_uri {
                (None, Some(from))
            } else {
                (Some(whole_path(Path::new(&from))?), None)
            };
            let shown = name.to_string();
            let request = ImportVolume {
                name,
                file,
                uri,
                snapshot: None,
                format: format.map(Into::into),
                to: stored(to, device.as_ref()),
                device: device.as_deref().map(whole_path).transpose()?,
            };
            let view = long_work(context, &shown, "/v1/imports", &request).await?;
            context.answer(&view, show::volume);
        }
        VolumeCommand::Export { name, file, format } => {
            let file = whole_path(&file)?;
            let request = ExportVolume {
                file: file.clone(),
                format: format.into(),
            };
            let path = format!("/v1/volumes/{name}/export");
            long_work(context, name.as_str(), &path, &request).await?;
            context.done(&format!("volume {name} is in {}", file.display()));
        }
        VolumeCommand::Serve {
            name,
            tcp,
            tls,
            plain_text,
            writable,
        } => {
            let tls = tls.as_deref().map(whole_path).transpose()?;
            let uri = uri_of(tcp, &name, tls.as_deref());
            let request = ServeVolume {
                address: tcp,
                tls,
                plain_text,
                writable,
            };
            let path = format!("/v1/volumes/{name}/serve");
            let mut is_told = false;
            let news = |progress: ImportProgress| {
                if progress.total > 0 && !std::mem::replace(&mut is_told, true) {
                    let served = Served {
                        volume: &name,
                        uri: &uri,
                        writable,
                    };
                    context.answer(&served, |served| served.text());
                }
            };
            let _: VolumeView = client
                .stream(Method::POST, &path, Some(&request), news)
                .await?;
        }
        VolumeCommand::Clone { name, new, format } => {
            let shown = new.to_string();
            let request = CloneVolume {
                name: new,
                format: format.map(Into::into),
            };
            let path = format!("/v1/volumes/{name}/clone");
            let view = long_work(context, &shown, &path, &request).await?;
            context.answer(&view, show::volume);
        }
        VolumeCommand::Resize { name, size, shrink } => {
            let request = ResizeVolume { size, shrink };
            let view = client
                .post(&format!("/v1/volumes/{name}/resize"), &request)
                .await?;
            context.answer(&view, show::volume);
        }
        VolumeCommand::Check { name, repair } => {
            let view: CheckView = client
                .post(
                    &format!("/v1/volumes/{name}/check"),
                    &CheckVolume { repair },
                )
                .await?;
            context.answer(&view, picture::check);
            if view.verdict == FindingKind::Broken {
                return Err(CliError::Broken { volume: name });
            }
        }
        VolumeCommand::Map { name, cells } => {
            let cells = cells.unwrap_or(DEFAULT_CELLS);
            let view = client
                .get(&format!("/v1/volumes/{name}/map?cells={cells}"))
                .await?;
            context.answer(&view, picture::map);
        }
        VolumeCommand::Heat { name, top } => {
            let view = client
                .get(&format!("/v1/volumes/{name}/heat?top={top}"))
                .await?;
            context.answer(&view, picture::heat);
        }
        VolumeCommand::Ls => {
            let list: Listed<VolumeView> = client.get("/v1/volumes").await?;
            context.answer_list(&list, show::volumes);
        }
        VolumeCommand::Show { name } => {
            let view = client.get(&format!("/v1/volumes/{name}")).await?;
            context.answer(&view, show::volume);
        }
        VolumeCommand::Rm { name } => {
            client.delete(&format!("/v1/volumes/{name}")).await?;
            context.done(&format!("volume {name} is gone"));
        }
    }
    Ok(())
}

/// Where a volume is served.
#[derive(Serialize)]
struct Served<'a> {
    volume: &'a Name,
    uri: &'a str,
    writable: bool,
}

impl Served<'_> {
    fn text(&self) -> String {
        let how = if self.writable {
            "to read and write"
        } else {
            "to read"
        };
        format!(
            "volume {} is served {how} at\n  {}\nuntil this command is ended (Ctrl-C)",
            self.volume, self.uri
        )
    }
}

/// What clients on this computer are given; others put their way to it in.
fn uri_of(at: SocketAddr, name: &Name, tls: Option<&Path>) -> String {
    let place = match at.ip().is_unspecified() {
        true => format!("localhost:{}", at.port()),
        false => at.to_string(),
    };
    match tls {
        None => format!("nbd://{place}/{name}"),
        Some(folder) => format!(
            "nbds://{place}/{name}?tls-certificates={}",
            folder.display()
        ),
    }
}

/// Sixteen lines of 64.
const DEFAULT_CELLS: u32 = 1024;

fn stored(arg: StoreArg, device: Option<&PathBuf>) -> Format {
    match device {
        Some(_) => Format::Device,
        None => arg.into(),
    }
}

/// Asks for what takes long, and shows how far it is. Ending the command ends the work.
async fn long_work<B: Serialize>(
    context: &Context,
    name: &str,
    path: &str,
    request: &B,
) -> Result<VolumeView, CliError> {
    let mut shown = ImportShow::new(context.json, name);
    let news = |progress: ImportProgress| shown.show(progress);
    let view = context
        .client
        .stream(Method::POST, path, Some(request), news)
        .await?;
    shown.finish();
    Ok(view)
}

/// The daemon works in another folder.
pub fn whole_path(path: &Path) -> Result<PathBuf, CliError> {
    std::path::absolute(path).map_err(|source| CliError::File {
        action: "find",
        path: path.to_path_buf(),
        source,
    })
}
