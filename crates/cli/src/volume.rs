//! `whimbrel volume ...`

use crate::args::VolumeCommand;
use crate::context::Context;
use crate::error::CliError;
use crate::progress::ImportShow;
use crate::show;
use hyper::Method;
use std::path::{Path, PathBuf};
use whimbrel_host::api::{CreateVolume, ImportProgress, ImportVolume, Listed, VolumeView};

pub async fn volume(context: &Context, command: VolumeCommand) -> Result<(), CliError> {
    let client = &context.client;
    match command {
        VolumeCommand::Create { name, size } => {
            let view = client
                .post("/v1/volumes", &CreateVolume { name, size })
                .await?;
            context.answer(&view, show::volume);
        }
        VolumeCommand::Import { name, file, format } => {
            let mut shown = ImportShow::new(context.json, name.as_str());
            let request = ImportVolume {
                name,
                file: whole_path(&file)?,
                format: format.into(),
            };
            let news = |progress: ImportProgress| shown.show(progress);
            let view: VolumeView = client
                .stream(Method::POST, "/v1/imports", Some(&request), news)
                .await?;
            shown.finish();
            context.answer(&view, show::volume);
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

/// The daemon works in another folder.
pub fn whole_path(path: &Path) -> Result<PathBuf, CliError> {
    std::path::absolute(path).map_err(|source| CliError::File {
        action: "find",
        path: path.to_path_buf(),
        source,
    })
}
