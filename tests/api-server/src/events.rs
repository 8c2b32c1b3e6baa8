//! What is served of a namespace: a Service by its name, and Events, which are
//! created and kept.

use http_body_util::BodyExt as _;
use hyper::{Method, Request, Response, StatusCode};
use serde_json::{Value, json};

use super::{ApiServer, Body, Query, answer, lock, refused};
use crate::store::{Key, Resource};

/// What follows the namespace in a path.
enum Collection<'a> {
    Services(&'a str),
    Events(&'a str),
}

fn collection(path: &str) -> Option<Collection<'_>> {
    let path = path.strip_prefix("/api/v1/namespaces/")?;
    match path.split_once('/')? {
        (namespace, "services") => Some(Collection::Services(namespace)),
        (namespace, "events") => Some(Collection::Events(namespace)),
        _ => None,
    }
}

impl ApiServer {
    /// The Events that were created, in order.
    pub fn events(&self) -> Vec<Value> {
        lock(&self.events).clone()
    }

    /// Answers what is asked of a namespace; `None` if nothing is.
    pub(crate) async fn of_namespace<B>(&self, request: Request<B>) -> Option<Response<Body>>
    where
        B: hyper::body::Body,
    {
        let path = request.uri().path().to_owned();
        match collection(&path)? {
            Collection::Services(namespace) => {
                let query = Query::parse(request.uri().query().unwrap_or_default());
                let selector = query.get("fieldSelector").unwrap_or_default();
                let name = selector.strip_prefix("metadata.name=").unwrap_or_default();
                let key = Key {
                    resource: Resource::Services,
                    namespace: namespace.to_owned(),
                    name: name.to_owned(),
                };
                let found: Vec<Value> = self.objects().remove(&key).into_iter().collect();
                let list = json!({
                    "kind": "ServiceList", "apiVersion": "v1",
                    "metadata": {"resourceVersion": "1"}, "items": found,
                });
                Some(answer(StatusCode::OK, Body::whole(list.to_string())))
            }
            Collection::Events(namespace) if request.method() == Method::POST => {
                let body = request.into_body().collect().await.ok()?.to_bytes();
                Some(self.create_event(namespace, &body))
            }
            Collection::Events(_) => Some(refused(405, "only POST", None)),
        }
    }

    fn create_event(&self, namespace: &str, body: &[u8]) -> Response<Body> {
        let Ok(event) = serde_json::from_slice::<Value>(body) else {
            return refused(400, "the body is no JSON", None);
        };
        let metadata = &event["metadata"];
        let about = &event["involvedObject"];
        if metadata["namespace"] != namespace || about["namespace"] != namespace {
            return refused(422, "involvedObject.namespace: does not match", None);
        }
        let mut events = lock(&self.events);
        if events.iter().any(|known| {
            known["metadata"]["name"] == metadata["name"]
                && known["metadata"]["namespace"] == metadata["namespace"]
        }) {
            return refused(409, "the event exists already", None);
        }
        events.push(event.clone());
        answer(StatusCode::CREATED, Body::whole(event.to_string()))
    }
}
