//! Paths and methods of the API, over any [`Service`].
//!
//! | request | answer |
//! |---|---|
//! | `GET /v1/host` | `HostView` |
//! | `GET /v1/peers` · `PUT /v1/peers` (`TrustRequest`) · `DELETE /v1/peers/NAME[?force=true]` | `Listed<PeerView>`, `PeerView`, nothing |
//! | `POST /v1/peers/NAME/rename` (`RenamePeer`) · `allow` (`AllowPeer`) | `PeerView` |
//! | `GET`, `POST /v1/invitations` (`InviteRequest`) · `DELETE /v1/invitations/ID` | `Listed<InvitationView>`, `InviteView`, `InvitationView` |
//! | `POST /v1/joins` (`JoinHost`) | `JoinView` |
//! | `GET`, `POST /v1/volumes` (`CreateVolume`) · `GET`, `DELETE /v1/volumes/NAME` | `Listed<VolumeView>`, `VolumeView` |
//! | `POST /v1/volumes/NAME/export` (`ExportVolume`) · `clone` (`CloneVolume`) · `serve` (`ServeVolume`) | stream of `ImportLine` |
//! | `POST /v1/volumes/NAME/resize` (`ResizeVolume`) · `check` (`CheckVolume`) | `VolumeView`, `CheckView` |
//! | `GET /v1/volumes/NAME/map?cells=N` · `heat?top=N` | `MapView`, `HeatView` |
//! | `POST /v1/recordings/NAME` (`RecordTrace`) · `DELETE` | stream of `RecordingLine`, nothing |
//! | `POST /v1/imports` (`ImportVolume`) | stream of `ImportLine` |
//! | `GET`, `POST /v1/machines` (`MachineSpec`) · `GET`, `DELETE /v1/machines/NAME` | `Listed<MachineView>`, `MachineView` |
//! | `POST /v1/adoptions` (`AdoptRequest`) | `MachineView` |
//! | `POST /v1/machines/NAME/start` · `stop` (`StopRequest`) | `MachineView` |
//! | `POST /v1/machines/NAME/snapshot` (`CreateSnapshot`) | stream of `SnapshotLine` |
//! | `POST /v1/machines/NAME/switch` · `cancel` · `throttle` (`ThrottleRequest`) | `MigrationView` |
//! | `GET`, `POST /v1/migrations` (`MigrateRequest`) · `GET /v1/migrations/ID` | `Listed<MigrationView>`, `MigrationView` |
//! | `GET /v1/migrations/ID/watch` | stream of `WatchLine` |
//! | `GET /v1/reports` · `GET /v1/reports/ID` | `Listed<ReportEntry>`, `ReportView` |
//!
//! Every refusal is an [`ApiError`] with a status that fits its code.

use super::error::{ApiError, ErrorCode};
use super::service::Service;
use super::stream;
use super::types::*;
use crate::state::{ByteSize, MachineSpec, MigrationId, Name};
use axum::body::Bytes;
use axum::extract::{DefaultBodyLimit, FromRequest, FromRequestParts, Path, Request, State};
use axum::http::request::Parts;
use axum::http::{Method, StatusCode, Uri};
use axum::response::{IntoResponse, Response};
use axum::routing::{delete, get, post};
use axum::{Json, Router};
use serde::Serialize;
use serde::de::DeserializeOwned;
use std::fmt::Display;
use std::str::FromStr;
use std::sync::Arc;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;
use whimbrel_peer::invitation::InvitationId;
use whimbrel_peer::trust::PeerName;

/// Largest request body, bytes; a longer one is refused.
pub const MAX_BODY: usize = 1 << 20;

struct Shared<S> {
    service: Arc<S>,
    stopping: CancellationToken,
}

impl<S> Clone for Shared<S> {
    fn clone(&self) -> Self {
        Shared {
            service: self.service.clone(),
            stopping: self.stopping.clone(),
        }
    }
}

type Of<S> = State<Shared<S>>;
type Answer<T> = Result<Json<T>, ApiError>;

/// The API over `service`. Streams end when `stopping` is cancelled.
pub fn router<S: Service>(service: Arc<S>, stopping: CancellationToken) -> Router {
    Router::new()
        .route("/v1/host", get(host::<S>))
        .route("/v1/peers", get(peers::<S>).put(trust::<S>))
        .route("/v1/peers/{name}", delete(revoke::<S>))
        .route("/v1/peers/{name}/rename", post(rename_peer::<S>))
        .route("/v1/peers/{name}/allow", post(allow_peer::<S>))
        .route("/v1/invitations", get(invitations::<S>).post(invite::<S>))
        .route("/v1/invitations/{id}", delete(cancel_invitation::<S>))
        .route("/v1/joins", post(join_host::<S>))
        .route("/v1/volumes", get(volumes::<S>).post(create_volume::<S>))
        .route(
            "/v1/volumes/{name}",
            get(volume::<S>).delete(remove_volume::<S>),
        )
        .route("/v1/volumes/{name}/export", post(export_volume::<S>))
        .route("/v1/volumes/{name}/serve", post(serve_volume::<S>))
        .route("/v1/volumes/{name}/clone", post(clone_volume::<S>))
        .route("/v1/volumes/{name}/resize", post(resize_volume::<S>))
        .route("/v1/volumes/{name}/check", post(check_volume::<S>))
        .route("/v1/volumes/{name}/map", get(map_volume::<S>))
        .route("/v1/volumes/{name}/heat", get(heat_volume::<S>))
        .route("/v1/imports", post(import_volume::<S>))
        .route(
            "/v1/recordings/{name}",
            post(record_trace::<S>).delete(end_recording::<S>),
        )
        .route("/v1/machines", get(machines::<S>).post(define_machine::<S>))
        .route(
            "/v1/machines/{name}",
            get(machine::<S>).delete(undefine_machine::<S>),
        )
        .route("/v1/machines/{name}/start", post(start_machine::<S>))
        .route("/v1/machines/{name}/stop", post(stop_machine::<S>))
        .route("/v1/machines/{name}/snapshot", post(create_snapshot::<S>))
        .route("/v1/machines/{name}/resume", post(resume_machine::<S>))
        .route(
            "/v1/machines/{name}/recovery",
            get(recovery::<S>).post(recover::<S>),
        )
        .route("/v1/machines/{name}/switch", post(switch::<S>))
        .route("/v1/machines/{name}/cancel", post(cancel::<S>))
        .route("/v1/machines/{name}/throttle", post(throttle::<S>))
        .route("/v1/adoptions", post(adopt_machine::<S>))
        .route("/v1/migrations", get(migrations::<S>).post(migrate::<S>))
        .route("/v1/migrations/{id}", get(migration::<S>))
        .route("/v1/migrations/{id}/watch", get(watch_migration::<S>))
        .route("/v1/reports", get(reports::<S>))
        .route("/v1/reports/{id}", get(report::<S>))
        .fallback(no_such_path)
        .method_not_allowed_fallback(no_such_method)
        .layer(DefaultBodyLimit::max(MAX_BODY))
        .with_state(Shared { service, stopping })
}

impl IntoResponse for ApiError {
    fn into_response(self) -> Response {
        let status =
            StatusCode::from_u16(self.code.status()).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
        (status, Json(self)).into_response()
    }
}

/// The name or identifier in the path.
struct Called<T>(T);

impl<T, X> FromRequestParts<X> for Called<T>
where
    T: FromStr<Err: Display>,
    X: Send + Sync,
{
    type Rejection = ApiError;

    async fn from_request_parts(parts: &mut Parts, state: &X) -> Result<Self, ApiError> {
        let Path(text) = Path::<String>::from_request_parts(parts, state)
            .await
            .map_err(|e| ApiError::new(ErrorCode::Invalid, e.body_text()))?;
        text.parse().map(Called).map_err(|e: T::Err| {
            ApiError::new(ErrorCode::Invalid, e.to_string()).machine_state("nothing was changed")
        })
    }
}

/// The request's body.
struct Said<T>(T);

impl<T: DeserializeOwned, X: Send + Sync> FromRequest<X> for Said<T> {
    type Rejection = ApiError;

    async fn from_request(request: Request, state: &X) -> Result<Self, ApiError> {
        let refused = |what: String| {
            ApiError::new(
                ErrorCode::Invalid,
                format!("the request is not understood: {what}"),
            )
            .machine_state("nothing was changed")
        };
        let body = Bytes::from_request(request, state)
            .await
            .map_err(|e| refused(e.body_text()))?;
        // An empty body stands for an object without keys: every key may be left out.
        let text: &[u8] = if body.is_empty() { b"{}" } else { &body };
        serde_json::from_slice(text)
            .map(Said)
            .map_err(|e| refused(e.to_string()))
    }
}

fn json<T: Serialize>(value: T) -> Json<T> {
    Json(value)
}

async fn no_such_path(uri: Uri) -> ApiError {
    ApiError::new(
        ErrorCode::NotFound,
        format!("the API has no {}", uri.path()),
    )
    .next_step("use a command and a daemon of the same version")
}

async fn no_such_method(method: Method, uri: Uri) -> ApiError {
    ApiError::new(
        ErrorCode::Invalid,
        format!("the API has no {method} for {}", uri.path()),
    )
    .next_step("use a command and a daemon of the same version")
}

async fn host<S: Service>(State(s): Of<S>) -> Answer<HostView> {
    s.service.host().await.map(json)
}

async fn peers<S: Service>(State(s): Of<S>) -> Answer<Listed<PeerView>> {
    s.service.peers().await.map(json)
}

async fn trust<S: Service>(State(s): Of<S>, Said(request): Said<TrustRequest>) -> Answer<PeerView> {
    s.service.trust(request).await.map(json)
}

async fn revoke<S: Service>(
    State(s): Of<S>,
    Called(name): Called<PeerName>,
    axum::extract::RawQuery(query): axum::extract::RawQuery,
) -> Answer<()> {
    let force = match query.as_deref() {
        None | Some("" | "force=false") => false,
        Some("force=true") => true,
        Some(other) => {
            let what = format!("`{other}` is not understood: only force=true or force=false is");
            return Err(
                ApiError::new(ErrorCode::Invalid, what).machine_state("nothing was changed")
            );
        }
    };
    s.service.revoke(name, force).await.map(json)
}

async fn rename_peer<S: Service>(
    State(s): Of<S>,
    Called(name): Called<PeerName>,
    Said(request): Said<RenamePeer>,
) -> Answer<PeerView> {
    s.service.rename_peer(name, request.name).await.map(json)
}

async fn allow_peer<S: Service>(
    State(s): Of<S>,
    Called(name): Called<PeerName>,
    Said(change): Said<AllowPeer>,
) -> Answer<PeerView> {
    s.service.allow_peer(name, change).await.map(json)
}

async fn invitations<S: Service>(State(s): Of<S>) -> Answer<Listed<InvitationView>> {
    s.service.invitations().await.map(json)
}

async fn invite<S: Service>(
    State(s): Of<S>,
    Said(request): Said<InviteRequest>,
) -> Answer<InviteView> {
    s.service.invite(request).await.map(json)
}

async fn cancel_invitation<S: Service>(
    State(s): Of<S>,
    Called(id): Called<InvitationId>,
) -> Answer<InvitationView> {
    s.service.cancel_invitation(id).await.map(json)
}

async fn join_host<S: Service>(State(s): Of<S>, Said(request): Said<JoinHost>) -> Answer<JoinView> {
    s.service.join_host(request).await.map(json)
}

async fn volumes<S: Service>(State(s): Of<S>) -> Answer<Listed<VolumeView>> {
    s.service.volumes().await.map(json)
}

async fn volume<S: Service>(State(s): Of<S>, Called(name): Called<Name>) -> Answer<VolumeView> {
    s.service.volume(name).await.map(json)
}

async fn create_volume<S: Service>(
    State(s): Of<S>,
    Said(request): Said<CreateVolume>,
) -> Answer<VolumeView> {
    if let Some(size) = request.size {
        whole_sectors(size)?;
    }
    match &request.device {
        Some(device) => whole_path(device, "device")?,
        None if request.format == Format::Device => {
            return Err(ApiError::new(ErrorCode::Invalid, "no device is named")
                .machine_state("nothing was changed"));
        }
        None => {}
    }
    s.service.create_volume(request).await.map(json)
}

fn whole_sectors(size: ByteSize) -> Result<(), ApiError> {
    let sector = whimbrel_engine::space::SECTOR;
    if size.0 != 0 && size.0.is_multiple_of(sector) {
        return Ok(());
    }
    let next = (size.0 / sector).max(1) * sector;
    Err(ApiError::new(
        ErrorCode::Invalid,
        format!("a volume of {size} cannot be: sizes are whole sectors of {sector} bytes"),
    )
    .machine_state("nothing was changed")
    .next_step(format!("ask for {}, say", ByteSize(next))))
}

/// The daemon works in a folder of its own.
fn whole_path(path: &std::path::Path, what: &str) -> Result<(), ApiError> {
    if path.is_absolute() {
        return Ok(());
    }
    Err(ApiError::new(
        ErrorCode::Invalid,
        format!("the {what} must be named with its whole path"),
    )
    .at(Some(path.display().to_string()))
    .machine_state("nothing was changed"))
}

async fn export_volume<S: Service>(
    State(s): Of<S>,
    Called(name): Called<Name>,
    Said(request): Said<ExportVolume>,
) -> Result<Response, ApiError> {
    whole_path(&request.file, "file to export to")?;
    if request.format == Format::Device {
        return Err(
            ApiError::new(ErrorCode::Invalid, "an export goes to a file: raw or qcow2")
                .machine_state("nothing was changed"),
        );
    }
    let (progress, news) = watch::channel(ImportProgress::default());
    let service = s.service;
    let work = async move { service.export_volume(name, request, progress).await };
    Ok(stream::import(work, news, s.stopping))
}

async fn clone_volume<S: Service>(
    State(s): Of<S>,
    Called(name): Called<Name>,
    Said(request): Said<CloneVolume>,
) -> Result<Response, ApiError> {
    if request.format == Some(Format::Device) {
        return Err(
            ApiError::new(ErrorCode::Invalid, "a clone is a file: raw or qcow2")
                .machine_state("nothing was changed"),
        );
    }
    let (progress, news) = watch::channel(ImportProgress::default());
    let service = s.service;
    let work = async move { service.clone_volume(name, request, progress).await };
    Ok(stream::import(work, news, s.stopping))
}

async fn serve_volume<S: Service>(
    State(s): Of<S>,
    Called(name): Called<Name>,
    Said(request): Said<ServeVolume>,
) -> Result<Response, ApiError> {
    if let Some(folder) = &request.tls {
        whole_path(folder, "folder of certificates")?;
    }
    let (progress, news) = watch::channel(ImportProgress::default());
    let service = s.service;
    let work = async move { service.serve_volume(name, request, progress).await };
    Ok(stream::import(work, news, s.stopping))
}

async fn record_trace<S: Service>(
    State(s): Of<S>,
    Called(name): Called<Name>,
    Said(request): Said<RecordTrace>,
) -> Result<Response, ApiError> {
    whole_path(&request.file, "trace to make")?;
    let (progress, news) = watch::channel(RecordingProgress::default());
    let service = s.service;
    let work = async move { service.record_trace(name, request, progress).await };
    Ok(stream::import(work, news, s.stopping))
}

async fn end_recording<S: Service>(State(s): Of<S>, Called(name): Called<Name>) -> Answer<()> {
    s.service.end_recording(name).await.map(json)
}

async fn resize_volume<S: Service>(
    State(s): Of<S>,
    Called(name): Called<Name>,
    Said(request): Said<ResizeVolume>,
) -> Answer<VolumeView> {
    whole_sectors(request.size)?;
    s.service.resize_volume(name, request).await.map(json)
}

async fn check_volume<S: Service>(
    State(s): Of<S>,
    Called(name): Called<Name>,
    Said(request): Said<CheckVolume>,
) -> Answer<CheckView> {
    s.service.check_volume(name, request).await.map(json)
}

/// Most cells of a map, and most extents of a list of the hottest.
const MOST_CELLS: usize = 65_536;

fn number(query: Option<&str>, key: &str, default: usize) -> Result<usize, ApiError> {
    let pairs = query.unwrap_or("").split('&');
    let asked = pairs
        .filter_map(|pair| pair.split_once('='))
        .find(|(k, _)| *k == key);
    let Some((_, text)) = asked else {
        return Ok(default);
    };
    match text.parse() {
        Ok(n @ 1..=MOST_CELLS) => Ok(n),
        _ => Err(ApiError::new(
            ErrorCode::Invalid,
            format!("`{key}` must be a number from 1 to {MOST_CELLS}, not `{text}`"),
        )
        .machine_state("nothing was changed")),
    }
}

async fn map_volume<S: Service>(
    State(s): Of<S>,
    Called(name): Called<Name>,
    axum::extract::RawQuery(query): axum::extract::RawQuery,
) -> Answer<MapView> {
    let cells = number(query.as_deref(), "cells", 1024)?;
    s.service.map_volume(name, cells).await.map(json)
}

async fn heat_volume<S: Service>(
    State(s): Of<S>,
    Called(name): Called<Name>,
    axum::extract::RawQuery(query): axum::extract::RawQuery,
) -> Answer<HeatView> {
    let top = number(query.as_deref(), "top", 20)?;
    s.service.heat_volume(name, top).await.map(json)
}

async fn remove_volume<S: Service>(State(s): Of<S>, Called(name): Called<Name>) -> Answer<()> {
    s.service.remove_volume(name).await.map(json)
}

async fn import_volume<S: Service>(
    State(s): Of<S>,
    Said(request): Said<ImportVolume>,
) -> Result<Response, ApiError> {
    match (&request.file, &request.uri, &request.snapshot) {
        (Some(file), None, None) => whole_path(file, "file to import")?,
        (None, Some(_), None) => {}
        (None, None, Some(from)) => whole_path(&from.repository, "repository")?,
        _ => {
            return Err(ApiError::new(
                ErrorCode::Invalid,
                "an import is of a file, of a URI or of a snapshot, one of the three",
            )
            .machine_state("nothing was changed"));
        }
    }
    if let Some(device) = &request.device {
        whole_path(device, "device")?;
    } else if request.to == Format::Device {
        return Err(ApiError::new(ErrorCode::Invalid, "no device is named")
            .machine_state("nothing was changed"));
    }
    let (progress, news) = watch::channel(ImportProgress::default());
    let service = s.service;
    let work = async move { service.import_volume(request, progress).await };
    Ok(stream::import(work, news, s.stopping))
}

async fn create_snapshot<S: Service>(
    State(s): Of<S>,
    Called(name): Called<Name>,
    Said(request): Said<CreateSnapshot>,
) -> Result<Response, ApiError> {
    whole_path(&request.repository, "repository")?;
    let (progress, news) = watch::channel(ImportProgress::default());
    let service = s.service;
    let work = async move { service.create_snapshot(name, request, progress).await };
    Ok(stream::import(work, news, s.stopping))
}

async fn machines<S: Service>(State(s): Of<S>) -> Answer<Listed<MachineView>> {
    s.service.machines().await.map(json)
}

async fn machine<S: Service>(State(s): Of<S>, Called(name): Called<Name>) -> Answer<MachineView> {
    s.service.machine(name).await.map(json)
}

fn checked(spec: &MachineSpec) -> Result<(), ApiError> {
    spec.check().map_err(|e| {
        ApiError::new(ErrorCode::Invalid, e.to_string())
            .machine_state("nothing was changed")
            .next_step(e.next_step())
    })
}

async fn define_machine<S: Service>(
    State(s): Of<S>,
    Said(spec): Said<MachineSpec>,
) -> Answer<MachineView> {
    checked(&spec)?;
    s.service.define_machine(spec).await.map(json)
}

async fn adopt_machine<S: Service>(
    State(s): Of<S>,
    Said(request): Said<AdoptRequest>,
) -> Answer<MachineView> {
    checked(&request.spec)?;
    s.service.adopt_machine(request).await.map(json)
}

async fn start_machine<S: Service>(
    State(s): Of<S>,
    Called(name): Called<Name>,
) -> Answer<MachineView> {
    s.service.start_machine(name).await.map(json)
}

async fn stop_machine<S: Service>(
    State(s): Of<S>,
    Called(name): Called<Name>,
    Said(request): Said<StopRequest>,
) -> Answer<MachineView> {
    s.service.stop_machine(name, request).await.map(json)
}

async fn resume_machine<S: Service>(
    State(s): Of<S>,
    Called(name): Called<Name>,
) -> Answer<MachineView> {
    s.service.resume_machine(name).await.map(json)
}

async fn recovery<S: Service>(State(s): Of<S>, Called(name): Called<Name>) -> Answer<RecoveryView> {
    s.service.recovery(name).await.map(json)
}

async fn recover<S: Service>(
    State(s): Of<S>,
    Called(name): Called<Name>,
    Said(request): Said<RecoverRequest>,
) -> Answer<MigrationView> {
    s.service.recover(name, request).await.map(json)
}

async fn undefine_machine<S: Service>(State(s): Of<S>, Called(name): Called<Name>) -> Answer<()> {
    s.service.undefine_machine(name).await.map(json)
}

async fn migrations<S: Service>(State(s): Of<S>) -> Answer<Listed<MigrationView>> {
    s.service.migrations().await.map(json)
}

async fn migration<S: Service>(
    State(s): Of<S>,
    Called(id): Called<MigrationId>,
) -> Answer<MigrationView> {
    s.service.migration(id).await.map(json)
}

async fn migrate<S: Service>(
    State(s): Of<S>,
    Said(request): Said<MigrateRequest>,
) -> Answer<MigrationView> {
    s.service.migrate(request).await.map(json)
}

async fn switch<S: Service>(State(s): Of<S>, Called(name): Called<Name>) -> Answer<MigrationView> {
    s.service.switch(name).await.map(json)
}

async fn cancel<S: Service>(State(s): Of<S>, Called(name): Called<Name>) -> Answer<MigrationView> {
    s.service.cancel(name).await.map(json)
}

async fn throttle<S: Service>(
    State(s): Of<S>,
    Called(name): Called<Name>,
    Said(request): Said<ThrottleRequest>,
) -> Answer<MigrationView> {
    s.service.throttle(name, request.bandwidth).await.map(json)
}

async fn reports<S: Service>(State(s): Of<S>) -> Answer<Listed<ReportEntry>> {
    s.service.reports().await.map(json)
}

async fn report<S: Service>(
    State(s): Of<S>,
    Called(id): Called<MigrationId>,
) -> Answer<ReportView> {
    s.service.report(id).await.map(json)
}

async fn watch_migration<S: Service>(
    State(s): Of<S>,
    Called(id): Called<MigrationId>,
) -> Result<Response, ApiError> {
    let news = s.service.watch(id).await?;
    Ok(stream::watch_migration(news, s.stopping))
}
