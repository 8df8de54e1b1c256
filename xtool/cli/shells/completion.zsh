#compdef xtool
_xtool_ask() {  # KIND [DOMAIN]
    local -a found
    found=(${(f)"$(xtool ${_xtool_host:+-H} ${_xtool_host:+$_xtool_host} __complete "$@" 2>/dev/null)"})
    compadd -a found
}
_xtool_domains() { _xtool_ask domains }
_xtool_vdevs() { _xtool_ask vdevs "$_xtool_domain" }
_xtool_devices() { _xtool_ask devices "$_xtool_domain" }
_xtool_settings() { compadd -S '' -- @SETTINGS@ }
_xtool_hosts() { compadd -S '' -- @HOSTS@ }

_xtool_arguments_of() {  # VERB: its options and arguments
    case $1 in
@CASES@
    esac
}

_xtool() {
    local curcontext=$curcontext state line _xtool_host= _xtool_domain= verb
    typeset -A opt_args
    local -a verbs fits
    verbs=(@VERBS@)
    _arguments -C \
        '(-H --host)'{-H,--host}'[carry the verb out on another host]:host:_xtool_hosts' \
        '(-v --verbose)'{-v,--verbose}'[tell more]' '--version[show the version]' \
        '(-h --help)'{-h,--help}'[show the verbs]' \
        '1:verb:->verb' '*::argument:->rest' && return
    _xtool_host=${opt_args[-H]:-${opt_args[--host]:-}}
    case $state in
    verb) _describe -t verbs verb verbs ;;
    rest)
        verb=$words[1]
        fits=(${(M)${verbs%%:*}:#$verb*})
        (( ${fits[(Ie)$verb]} )) || { (( $#fits == 1 )) && verb=$fits[1] }
        local word
        for word in ${words[2,CURRENT-1]}; do
            [[ $word == -* ]] || { _xtool_domain=$word; break }
        done
        _xtool_arguments_of "$verb"
        ;;
    esac
}
if [[ $funcstack[1] == _xtool ]]; then _xtool "$@"; else compdef _xtool xtool; fi
