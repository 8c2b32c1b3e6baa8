//! The objects, and what happened to them.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::Arc;

use anyhow::Context as _;
use serde_json::Value;

/// A kind that is served.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Resource {
    /// `core/v1` Service.
    Services,
    /// `discovery.k8s.io/v1` EndpointSlice.
    EndpointSlices,
    /// `core/v1` Node.
    Nodes,
    /// `networking.k8s.io/v1` ServiceCIDR.
    ServiceCidrs,
}

/// All of them.
pub const RESOURCES: [Resource; 4] = [
    Resource::Services,
    Resource::EndpointSlices,
    Resource::Nodes,
    Resource::ServiceCidrs,
];

impl Resource {
    /// The word in `kind`.
    #[must_use]
    pub fn kind(self) -> &'static str {
        match self {
            Self::Services => "Service",
            Self::EndpointSlices => "EndpointSlice",
            Self::Nodes => "Node",
            Self::ServiceCidrs => "ServiceCIDR",
        }
    }

    /// Group and version.
    #[must_use]
    pub fn api_version(self) -> &'static str {
        match self {
            Self::Services | Self::Nodes => "v1",
            Self::EndpointSlices => "discovery.k8s.io/v1",
            Self::ServiceCidrs => "networking.k8s.io/v1",
        }
    }

    /// Where all of them are listed.
    #[must_use]
    pub fn path(self) -> &'static str {
        match self {
            Self::Services => "/api/v1/services",
            Self::EndpointSlices => "/apis/discovery.k8s.io/v1/endpointslices",
            Self::Nodes => "/api/v1/nodes",
            Self::ServiceCidrs => "/apis/networking.k8s.io/v1/servicecidrs",
        }
    }

    pub(crate) fn of_path(path: &str) -> Option<Self> {
        RESOURCES
            .into_iter()
            .find(|resource| resource.path() == path)
    }
}

/// Names an object.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Key {
    /// Its kind.
    pub resource: Resource,
    /// Its namespace; empty for what has none.
    pub namespace: String,
    /// Its name.
    pub name: String,
}

/// What happened to an object.
#[derive(Clone, Debug)]
pub(crate) struct Change {
    pub(crate) version: u64,
    pub(crate) resource: Resource,
    /// `ADDED`, `MODIFIED` or `DELETED`.
    pub(crate) what: &'static str,
    pub(crate) object: Arc<Value>,
}

type Objects = BTreeMap<Key, Arc<Value>>;

/// Part of a list.
pub(crate) struct Page {
    pub(crate) items: Vec<Value>,
    pub(crate) version: u64,
    pub(crate) next: Option<String>,
}

/// The state of the cluster, and as much of its past as was not forgotten.
#[derive(Debug, Default)]
pub(crate) struct Store {
    version: u64,
    objects: Objects,
    log: Vec<Change>,
    /// The version up to which the log was forgotten.
    forgotten: u64,
    /// States of which somebody has seen a page.
    pages: HashMap<u64, Objects>,
    deleted: BTreeSet<Key>,
}

impl Store {
    pub(crate) fn version(&self) -> u64 {
        self.version
    }

    pub(crate) fn put(&mut self, mut object: Value) -> anyhow::Result<Key> {
        let kind = object["kind"].as_str().context("kind")?;
        let resource = RESOURCES
            .into_iter()
            .find(|resource| resource.kind() == kind);
        let resource = resource.with_context(|| format!("kind {kind} is not served"))?;
        let metadata = &mut object["metadata"];
        let name = metadata["name"]
            .as_str()
            .context("metadata.name")?
            .to_owned();
        let namespaced = matches!(resource, Resource::Services | Resource::EndpointSlices);
        let namespace = match metadata["namespace"].as_str() {
            Some(namespace) => namespace.to_owned(),
            None if namespaced => "default".to_owned(),
            None => String::new(),
        };
        if namespaced {
            metadata["namespace"] = namespace.clone().into();
        }
        self.version += 1;
        metadata["resourceVersion"] = self.version.to_string().into();
        let key = Key {
            resource,
            namespace,
            name,
        };
        if object["metadata"]["uid"].is_null() {
            let known = self.objects.get(&key);
            let known = known.map(|known| known["metadata"]["uid"].clone());
            let uid = known.unwrap_or_else(|| format!("uid-{}", self.version).into());
            object["metadata"]["uid"] = uid;
        }
        let object = Arc::new(object);
        let before = self.objects.insert(key.clone(), Arc::clone(&object));
        self.log.push(Change {
            version: self.version,
            resource,
            what: if before.is_some() {
                "MODIFIED"
            } else {
                "ADDED"
            },
            object,
        });
        Ok(key)
    }

    pub(crate) fn delete(&mut self, key: &Key) {
        let Some(object) = self.objects.remove(key) else {
            return;
        };
        self.version += 1;
        let mut last = Value::clone(&object);
        last["metadata"]["resourceVersion"] = self.version.to_string().into();
        self.deleted.insert(key.clone());
        self.log.push(Change {
            version: self.version,
            resource: key.resource,
            what: "DELETED",
            object: Arc::new(last),
        });
    }

    pub(crate) fn objects(&self) -> BTreeMap<Key, Value> {
        let objects = self.objects.iter();
        objects
            .map(|(key, object)| (key.clone(), Value::clone(object)))
            .collect()
    }

    pub(crate) fn was_deleted(&self, key: &Key) -> bool {
        self.deleted.contains(key)
    }

    pub(crate) fn compact(&mut self) {
        self.forgotten = self.version;
        self.log.clear();
        self.pages.clear();
    }

    /// What of a kind there is now.
    pub(crate) fn all(&self, resource: Resource) -> Vec<Arc<Value>> {
        of(&self.objects, resource)
            .map(|(_, object)| Arc::clone(object))
            .collect()
    }

    /// What happened after a version; `None` where that was forgotten.
    pub(crate) fn since(&self, version: u64, resource: Resource) -> Option<Vec<Change>> {
        if version < self.forgotten {
            return None;
        }
        let start = self.log.partition_point(|change| change.version <= version);
        let changes = self.log[start..].iter();
        Some(
            changes
                .filter(|change| change.resource == resource)
                .cloned()
                .collect(),
        )
    }

    /// A page; `None` where what it is part of was forgotten.
    pub(crate) fn page(
        &mut self,
        resource: Resource,
        limit: Option<usize>,
        token: Option<&str>,
    ) -> Option<Page> {
        let (version, skip) = match token {
            None => (self.version, 0),
            Some(token) => {
                let (version, skip) = token.split_once('/')?;
                (version.parse().ok()?, skip.parse().ok()?)
            }
        };
        let state = match token {
            None => &self.objects,
            Some(_) => self.pages.get(&version)?,
        };
        let limit = limit.filter(|limit| *limit > 0).unwrap_or(usize::MAX);
        let mut rest = of(state, resource).skip(skip);
        let items: Vec<Value> = rest
            .by_ref()
            .take(limit)
            .map(|(_, object)| Value::clone(object))
            .collect();
        let more = rest.next().is_some();
        drop(rest);
        let next = more.then(|| format!("{version}/{}", skip + items.len()));
        if token.is_none() && next.is_some() {
            self.pages.insert(version, self.objects.clone());
        }
        Some(Page {
            items,
            version,
            next,
        })
    }
}

fn of(objects: &Objects, resource: Resource) -> impl Iterator<Item = (&Key, &Arc<Value>)> {
    objects
        .iter()
        .filter(move |(key, _)| key.resource == resource)
}
