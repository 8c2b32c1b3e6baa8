//! What is read out of the text of a manifest.

use super::*;

const TWO: &str = "\
# a comment before the first document
---
apiVersion: v1
kind: Service
metadata:
  name: web
  labels: null
spec:
  clusterIP: 10.96.0.10
  ports:
    - port: 80
---
apiVersion: v1
kind: Service
metadata:
  name: bad
  namespace: shop
spec:
  ports:
    - name: http
      port: 80
    - name: https
      port: 70000
--- # a ConfigMap is none of our business
apiVersion: v1
kind: ConfigMap
data: {text: \"x\"}
";

#[test]
fn a_mistake_leaves_the_other_documents_alone() {
    let parsed = parse(TWO);
    let names: Vec<String> = parsed.objects.iter().map(|o| o.key().to_string()).collect();
    assert_eq!(names, ["Service default/web"]);
    let [error] = parsed.errors.as_slice() else {
        panic!("{:?}", parsed.errors);
    };
    assert_eq!(error.line, 23, "{error}");
    assert_eq!(error.field, "spec.ports[1].port", "{error}");
    assert_eq!(
        error.object.as_ref().unwrap().to_string(),
        "Service shop/bad"
    );
    assert!(error.message.contains("70000"), "{error}");
}

#[test]
fn broken_yaml_is_named_by_its_line() {
    let parsed = parse("apiVersion: v1\nkind: Service\nmetadata: {name: x\nspec: [\n");
    assert!(parsed.objects.is_empty());
    let [error] = parsed.errors.as_slice() else {
        panic!("{:?}", parsed.errors);
    };
    assert!(error.line >= 3, "{error}");
    assert_eq!(error.object, None);
}

#[test]
fn lists_json_and_missing_fields() {
    let list = r#"{"apiVersion":"v1","kind":"List","items":[
        {"apiVersion":"v1","kind":"Node","metadata":{"name":"a"},"spec":{"podCIDRs":["10.1.0.0/24"]}},
        {"apiVersion":"v1","kind":"Service","metadata":{"name":"b"},"spec":{"ports":[{"port":"no"}]}},
        {"apiVersion":"v1","kind":"Service","metadata":{}}
    ]}"#;
    let parsed = parse(list);
    assert_eq!(parsed.objects.len(), 1);
    let places: Vec<(&str, &str)> = parsed
        .errors
        .iter()
        .map(|e| (&*e.item, &*e.field))
        .collect();
    assert_eq!(
        places,
        [
            ("items[1]", "spec.ports[0].port"),
            ("items[2]", "metadata.name")
        ]
    );
    assert_eq!(
        parse("kind: Service\nmetadata: {name: x}\n").errors[0].field,
        "apiVersion"
    );
    assert_eq!(parse("---\n---\n# nothing\n...\n"), Parsed::default());
}

#[test]
fn what_the_api_writes_as_null_is_absent() {
    let text = "apiVersion: discovery.k8s.io/v1\nkind: EndpointSlice\nmetadata:\n  name: s\n  \
                labels: null\naddressType: IPv4\nendpoints: null\nports: null\n";
    let parsed = parse(text);
    assert!(parsed.errors.is_empty(), "{:?}", parsed.errors);
    assert_eq!(parsed.objects.len(), 1);
    let text = "apiVersion: v1\nkind: Service\nmetadata:\n  name: s\n  labels: {app: }\n  \
                annotations:\n    note:\n    ferrule.io/scheduler: ~\n";
    let parsed = parse(text);
    assert!(parsed.errors.is_empty(), "{:?}", parsed.errors);
    let [Object::Service(service)] = parsed.objects.as_slice() else {
        panic!("{:?}", parsed.objects);
    };
    assert_eq!(service.metadata.labels["app"], "");
    assert_eq!(service.metadata.annotations["ferrule.io/scheduler"], "");
}

/// Where a document stands must not change what it says.
fn alone_and_in_lists(document: &str) -> (Vec<Object>, Vec<String>) {
    let said = |parsed: &Parsed| -> Vec<String> {
        let errors = parsed.errors.iter();
        errors
            .map(|error| format!("{:?} {} {}", error.object, error.field, error.message))
            .collect()
    };
    let alone = parse(document);
    let good = "apiVersion: v1\nkind: Node\nmetadata: {name: good}\n";
    let items = [document, good].map(|text| format!("- {}\n", text.replace('\n', "\n  ")));
    let list = parse(&format!(
        "apiVersion: v1\nkind: List\nitems:\n{}",
        items.concat()
    ));
    let (good_node, others) = list.objects.split_last().unwrap();
    assert_eq!(good_node.key().to_string(), "Node good", "{document}");
    assert_eq!(others, alone.objects, "{document}");
    assert_eq!(said(&list), said(&alone), "{document}");
    (alone.objects.clone(), said(&alone))
}

#[test]
fn a_scalar_is_the_same_alone_and_in_a_list() {
    let fields = [
        "metadata: {name: VALUE}",
        "metadata: {name: x, namespace: VALUE}",
        "metadata: {name: x, labels: {a: VALUE}}",
        "metadata: {name: x, labels: {VALUE: a}}",
        "metadata: {name: x}\nspec: {clusterIP: VALUE}",
        "metadata: {name: x}\nspec: {ports: [{port: VALUE}]}",
        "metadata: {name: x}\nspec: {ports: [{port: 1, name: VALUE}]}",
        "metadata: {name: x}\nother: {field: [VALUE]}",
    ];
    let odd = [
        "1e3",
        "007",
        "0x10",
        "0o7",
        "yes",
        "No",
        "on",
        "y",
        "true",
        "1_000",
        "1.10",
        ".nan",
        "-.inf",
        "-1",
        "123456789012345678901234567890",
        "1e999",
        "~",
        "null",
        "\"7\"",
        "2026-01-01",
        "[a]",
        "{a: b}",
        "!!str 7",
        "a\u{e9}",
    ];
    for field in fields {
        for value in odd {
            let field = field.replace("VALUE", value);
            alone_and_in_lists(&format!("apiVersion: v1\nkind: Service\n{field}\n"));
        }
    }
}

#[test]
fn what_yaml_takes_for_something_else_is_no_text() {
    let named = |name: &str| {
        alone_and_in_lists(&format!(
            "apiVersion: v1\nkind: Service\nmetadata: {{name: {name}}}\n"
        ))
    };
    for odd in [
        "1e3",
        "007",
        "0x10",
        "yes",
        "1_000",
        "1.10",
        ".nan",
        "10000000000000000000000",
    ] {
        let (objects, said) = named(odd);
        assert!(objects.is_empty(), "{odd}");
        assert!(said[0].contains("None metadata.name is the "), "{said:?}");
        assert!(said[0].ends_with("write it in quotes"), "{said:?}");
    }
    for fine in [
        "web",
        "\"007\"",
        "'yes'",
        "!!str 1e3",
        "10.96.0.10",
        "1e3x",
        "2026-01-01",
    ] {
        let (objects, said) = named(fine);
        assert_eq!(objects.len(), 1, "{fine}: {said:?}");
    }
}

#[test]
fn every_mistake_says_what_to_write() {
    let service = "apiVersion: v1\nkind: Service\nmetadata: {name: x}\nspec: ";
    let slice = "apiVersion: discovery.k8s.io/v1\nkind: EndpointSlice\nmetadata: {name: x}\n";
    let cases = [
        (
            service,
            "{ports: [{port: http}]}",
            "spec.ports[0].port is the text \"http\"; write a port number from 1 to 65535, without quotes",
        ),
        (
            service,
            "{ports: [{port: \"80\"}]}",
            "spec.ports[0].port is the text \"80\"; write a port number from 1 to 65535, without quotes",
        ),
        (
            service,
            "{ports: [{port: 70000}]}",
            "spec.ports[0].port 70000 is not a port number; give one from 1 to 65535",
        ),
        (
            service,
            "{ports: [{port: 8.5}]}",
            "spec.ports[0].port is the number 8.5; write a port number from 1 to 65535, without quotes",
        ),
        (
            service,
            "{ports: 80}",
            "spec.ports is the number 80; write a list, each entry on a line of its own behind \"- \"",
        ),
        (
            service,
            "{ports: [80]}",
            "spec.ports[0] is the number 80; write a mapping, each field on a line of its own",
        ),
        (
            service,
            "{ports: [{}]}",
            "spec.ports[0] has no port; add the field",
        ),
        (
            service,
            "{clusterIPs: 10.96.0.1}",
            "spec.clusterIPs is the text \"10.96.0.1\"; write a list, such as [10.96.0.1]",
        ),
        (
            service,
            "{clusterIP: [10.96.0.1]}",
            "spec.clusterIP is a list; write a text",
        ),
        (
            service,
            "{type: 7}",
            "spec.type is the number 7; write one of ClusterIP, NodePort, LoadBalancer, ExternalName",
        ),
        (
            service,
            "text",
            "spec is the text \"text\"; write a mapping, each field on a line of its own",
        ),
        (
            service,
            "{a: 1, b: {c: [{d: 1, d: 2}]}}",
            "spec.b.c[0].d stands twice; remove one of the two",
        ),
        (
            service,
            "{~: 1}",
            "spec a field has no name; write one before the colon",
        ),
        (
            slice,
            "addressType: IPv4\nports: [{port: http}]",
            "ports[0].port is the text \"http\"; write a port number from 1 to 65535, without quotes",
        ),
        (
            slice,
            "addressType: IPv4\nports: [{port: 70000}]",
            "ports[0].port 70000 is not a port number; give one from 1 to 65535",
        ),
        (
            slice,
            "addressType: IPv5",
            "addressType is the text \"IPv5\"; write one of IPv4, IPv6, FQDN",
        ),
        (
            slice,
            "addressType: IPv4\nendpoints: [{conditions: {ready: \"true\"}}]",
            "endpoints[0].conditions.ready is the text \"true\"; write true or false, without quotes",
        ),
    ];
    for (head, rest, expected) in cases {
        let (objects, said) = alone_and_in_lists(&format!("{head}{rest}\n"));
        assert!(objects.is_empty(), "{rest}");
        let [said] = said.as_slice() else {
            panic!("{said:?}");
        };
        assert!(said.ends_with(&format!(" {expected}")), "{said}");
        assert!(said.starts_with("Some("), "{said}");
    }
}

#[test]
fn a_line_of_a_list_is_that_of_the_field() {
    let list = "apiVersion: v1\nkind: List\nitems:\n- apiVersion: v1\n  kind: Service\n  \
                metadata:\n    name: x\n  spec:\n    ports:\n    - port: http\n";
    assert_eq!(parse(list).errors[0].line, 10);
    let alias = "apiVersion: v1\nkind: List\nitems:\n- &x\n  kind: Node\n- *x\n";
    let lines: Vec<u64> = parse(alias).errors.iter().map(|e| e.line).collect();
    assert_eq!(lines, [5, 6]);
}

#[test]
fn an_item_that_is_no_mapping_is_found_by_the_line_of_its_list() {
    let list = "apiVersion: v1\nkind: List\n\nitems:\n- text\n- []\n";
    let of_list = parse(list).errors;
    assert_eq!(of_list.iter().map(|e| e.line).collect::<Vec<_>>(), [4, 4]);
    assert_eq!(of_list[1].item, "items[1]");
}

#[test]
fn a_long_name_above_many_fields_takes_no_longer_than_beside_them() {
    let name = "n".repeat(4_000_000);
    let fields: Vec<String> = (0..50_000).map(|n| format!("f{n}: 1")).collect();
    let fields = fields.join(", ");
    let taken = |rest: String| {
        let start = std::time::Instant::now();
        let head = "apiVersion: v1\nkind: Node\nmetadata: {name: a}";
        assert_eq!(parse(&format!("{head}\n{rest}\n")).errors, []);
        start.elapsed()
    };
    let beside = taken(format!("a: {name}\nb: {{{fields}}}"));
    let above = taken(format!("? {name}\n: {{{fields}}}"));
    // A path for each field would be 200 GB of text, ten seconds and more.
    let limit = 4 * beside + std::time::Duration::from_secs(2);
    assert!(above < limit, "{above:?} above, {beside:?} beside");
}

#[test]
fn items_have_their_kind_from_a_list_of_one_kind() {
    for (api_version, kind) in [
        ("v1", "ServiceList"),
        ("v1", "NodeList"),
        ("discovery.k8s.io/v1", "EndpointSliceList"),
        ("networking.k8s.io/v1", "ServiceCIDRList"),
    ] {
        let parsed = parse(&format!(
            "apiVersion: {api_version}\nkind: {kind}\nitems:\n- metadata: {{name: a}}\n  addressType: \
             IPv4\n- metadata: {{}}\n- null\n- {{kind: ConfigMap, apiVersion: v1}}\n"
        ));
        let keys: Vec<String> = parsed.objects.iter().map(|o| o.key().to_string()).collect();
        let [key] = keys.as_slice() else {
            panic!("{keys:?}");
        };
        assert!(key.starts_with(kind.trim_end_matches("List")), "{key}");
        let fields: Vec<&str> = parsed.errors.iter().map(|e| &*e.field).collect();
        assert_eq!(fields, ["metadata.name"]);
    }
    assert_eq!(
        parse("apiVersion: apps/v1\nkind: ServiceList\n"),
        Parsed::default()
    );
}

#[test]
fn null_is_nothing_and_a_mapping_without_kind_is_a_mistake() {
    assert_eq!(parse("---\nnull\n---\n~\n"), Parsed::default());
    let parsed = parse("resources: [a.yaml]\n");
    assert_eq!(parsed.errors[0].field, "kind");
    assert!(!parsed.errors[0].syntax);
}

#[test]
fn other_kinds_may_say_what_they_like() {
    let head = "apiVersion: v1\nkind: Foreign\n";
    for rest in [
        "metadata: {name: 7}",
        "a: 1\na: .nan",
        "metadata: [a]",
        "? [a]\n: b",
        "? {a: b}\n: b",
        "~: a",
    ] {
        assert_eq!(
            parse(&format!("{head}{rest}\n")),
            Parsed::default(),
            "{rest}"
        );
    }
    let deep = format!("{head}a: {}{}\n", "[".repeat(158), "]".repeat(158));
    assert_eq!(parse(&deep), Parsed::default());
    let block: Vec<String> = (0..158)
        .map(|depth| format!("{}a:\n", " ".repeat(depth)))
        .collect();
    assert_eq!(
        parse(&format!("{head}{}", block.concat())),
        Parsed::default()
    );
    let deeper = deep.replace('[', "[[").replace(']', "]]");
    assert!(parse(&deeper).errors[0].syntax);
}

#[test]
fn broken_yaml_is_named_by_the_text_above() {
    let service = "apiVersion: v1\nkind: Service\nmetadata:\n  name: x\nspec:\n  a: b\n c: d\n";
    let list = service.replace('\n', "\n  ");
    let list = format!("apiVersion: v1\nkind: List\nitems:\n- {list}");
    for text in [service, &list] {
        let parsed = parse(text);
        let [error] = parsed.errors.as_slice() else {
            panic!("{parsed:?}");
        };
        let said = error.to_string();
        assert!(error.syntax, "{said}");
        assert!(said.contains("Service default/x: "), "{said}");
        assert!(
            said.ends_with("; correct the YAML of this line or of those above it"),
            "{said}"
        );
    }
    let tag = parse("apiVersion: v1\nkind: Service\nport: !!int abc\n");
    assert_eq!(
        tag.errors[0].to_string(),
        "line 3: a value is not what its tag says; remove the tag"
    );
    let twice = parse("apiVersion: v1\nkind: Service\nmetadata: {name: a, name: b}\n");
    assert_eq!(twice.errors[0].field, "metadata.name");
    // Of the next item nothing is known yet.
    let next = list.replace("   c: d\n", "- {\n");
    assert_eq!(parse(&next).errors[0].object, None);
}

#[test]
fn a_node_leaves_by_its_deletion_or_the_autoscalers_taint() {
    for (fields, leaves) in [
        ("metadata: {name: a}\nspec: {taints: null}", false),
        (
            "metadata: {name: a}\nspec: {taints: [{key: other, effect: NoSchedule}]}",
            false,
        ),
        (
            "metadata: {name: a}\nspec: {taints: [{key: other}, {key: ToBeDeletedByClusterAutoscaler, value: \"17\"}]}",
            true,
        ),
        (
            "metadata: {name: a, deletionTimestamp: \"2026-01-01T00:00:00Z\"}",
            true,
        ),
    ] {
        let parsed = parse(&format!("apiVersion: v1\nkind: Node\n{fields}\n"));
        let [Object::Node(node)] = parsed.objects.as_slice() else {
            panic!("{parsed:?}");
        };
        assert_eq!(node.is_leaving(), leaves, "{fields}");
    }
}
